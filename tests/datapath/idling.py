"""Runs in a child of test_trial.py: trial connections, once with each hook's program replaced by one without effect.

The argument is an empty cgroup; printed are the rows by hook, and under "" those of the programs as they are.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf import syscalls
from bpf.hooks import HOOKS, LOOKUP_HOOK, NETNS_HOOK, Hook
from bpf.pins import Pins
from bpf.steering import lead_to_lookup
from bpf.syscalls import Descriptor
from installer.probe.trial_connections import connect_as_pod, trial_node
from tests.lab.objects import load_program


@contextmanager
def idle(pins: Pins, hook: Hook) -> Iterator[None]:
    """Swap the program and put it back."""
    swap = _call if hook is LOOKUP_HOOK else _link
    with (
        Descriptor(load_program(hook.program_type, hook.attach_type, "idle")) as without_effect,
        swap(pins, hook, without_effect.fd),
    ):
        yield


@contextmanager
def _call(pins: Pins, hook: Hook, other: int) -> Iterator[None]:
    with (
        Descriptor(pins.open_map("inbound")) as inbound,
        Descriptor(syscalls.open_pin(pins.programs / hook.name)) as program,
    ):
        lead_to_lookup(inbound.fd, other)
        yield
        lead_to_lookup(inbound.fd, program.fd)


@contextmanager
def _link(pins: Pins, hook: Hook, other: int) -> Iterator[None]:
    (path,) = pins.netns.iterdir() if hook is NETNS_HOOK else [pins.links / hook.name]
    with (
        Descriptor(syscalls.open_pin(path)) as link,
        Descriptor(syscalls.open_program_id(syscalls.link_info(link.fd).prog_id)) as program,
    ):
        syscalls.update_link(link.fd, other, hook.name)
        yield
        syscalls.update_link(link.fd, program.fd, hook.name)


if __name__ == "__main__":
    with trial_node(Path(sys.argv[1])) as node:
        found = {"": connect_as_pod(node)}
        for each in HOOKS:
            with idle(node.pins, each):
                found[each.name] = connect_as_pod(node)
    sys.stdout.write(json.dumps(found))
