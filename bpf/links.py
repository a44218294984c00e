"""Inbound steering links, one per pod's network namespace, pinned by netns cookie."""

from collections.abc import Iterator
from contextlib import suppress

from bpf import syscalls
from bpf.compiler import NETNS_HOOK
from bpf.errors import KernelRefused
from bpf.pins import Pins
from bpf.syscalls import Descriptor


def link_pod(pins: Pins, cookie: int, netns_fd: int) -> bool:
    """Attach inbound steering to a pod's namespace and pin the link by cookie; False if the pin exists already.

    Raises KernelRefused.
    """
    path = pins.netns / str(cookie)
    if path.exists():
        return False
    with Descriptor(syscalls.open_pin(pins.programs / NETNS_HOOK.name)) as program:
        made = syscalls.create_link(program.fd, netns_fd, NETNS_HOOK.attach_type, f"netns {cookie}")
        with Descriptor(made) as link:
            syscalls.pin(link.fd, path)
    return True


def unlink_pod(pins: Pins, cookie: int) -> bool:
    """Detach inbound steering from a pod's namespace; False if there was no link."""
    try:
        (pins.netns / str(cookie)).unlink()
    except FileNotFoundError:
        return False
    return True


def linked_pods(pins: Pins) -> Iterator[tuple[int, int]]:
    """Every pinned pod link as (cookie, inode of the namespace).

    The inode is 0 if the namespace is gone or the link was detached.
    """
    for path in sorted(pins.netns.iterdir()):
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path)) as link:
            yield int(path.name), syscalls.link_info(link.fd).netns_inode


def pod_link_alive(pins: Pins, cookie: int) -> bool:
    """Whether the pod's namespace still exists and its link is still attached."""
    try:
        with Descriptor(syscalls.open_pin(pins.netns / str(cookie))) as link:
            return bool(syscalls.link_info(link.fd).netns_inode)
    except KernelRefused:
        return False
