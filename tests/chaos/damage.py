"""What is taken away, one thing at a time. Each action returns what puts right again what no agent could."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bpf import syscalls
from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from tests.chaos.ledger import SAME_SECOND
from tests.lab.node import Node
from tests.lab.pod import Pod

Restore = Callable[[], object]


def nothing() -> None:
    """Puts nothing right: the agent has to."""


class Damage:
    """Takes things away from a node with one mesh pod. `chance` decides what."""

    def __init__(self, node: Node, pod: Pod, chance: random.Random) -> None:
        self._node, self._pod, self._chance = node, pod, chance
        self._pins = Pins(node.bpffs)

    def strike(self) -> tuple[str, Restore]:
        """Do one thing. Returns what was done, and what to call a moment later."""
        action = self._chance.choice(
            [
                self._unpin_links,
                self._unpin_steering,
                self._unpin_programs,
                self._unpin_maps,
                self._unpin_everything,
                self._detach_link,
                self._detach_steering,
                self._kill_agent,
                self._end_agent,
                self._restart_proxy,
                self._forget_listeners,
                self._leave_cgroup,
            ]
        )
        with suppress(SidestepError, OSError, IndexError):  # an earlier action has taken it, and it is not back yet
            return action.__name__.strip("_").replace("_", " "), action()
        return action.__name__.strip("_").replace("_", " ") + " (gone already)", nothing

    def _unpin_links(self) -> Restore:
        return self._unpin(self._pins.links)

    def _unpin_steering(self) -> Restore:
        return self._unpin(self._pins.netns)

    def _unpin_programs(self) -> Restore:
        return self._unpin(self._pins.programs)

    def _unpin_maps(self) -> Restore:
        return self._unpin(self._pins.maps)

    def _unpin(self, directory: Path) -> Restore:
        """Some of what is pinned there, or all."""
        paths = sorted(directory.iterdir())
        self._chance.shuffle(paths)
        for path in paths if self._chance.random() < 0.5 else paths[:1]:
            path.unlink()
        return nothing

    def _unpin_everything(self) -> Restore:
        for directory in (self._pins.netns, self._pins.links, self._pins.programs, self._pins.maps):
            self._unpin(directory)
        return nothing

    def _detach_link(self) -> Restore:
        return self._detach(self._pins.links)

    def _detach_steering(self) -> Restore:
        return self._detach(self._pins.netns)

    def _detach(self, directory: Path) -> Restore:
        """As `bpftool link detach`: no descriptor keeps a program attached then."""
        path = self._chance.choice(sorted(directory.iterdir()))
        with Descriptor(syscalls.open_pin(path)) as link:
            syscalls.detach_link(link.fd, path)
        return nothing

    def _kill_agent(self) -> Restore:
        self._node.agent.kill()
        return self._node.agent.start

    def _end_agent(self) -> Restore:
        self._node.agent.terminate()
        return self._node.agent.start

    def _restart_proxy(self) -> Restore:
        self._pod.envoy.stop()
        return self._pod.envoy.start

    def _forget_listeners(self) -> Restore:
        with Tables(self._pins) as tables:
            for key in list(tables.listeners.every_key()):
                if key.port == INBOUND_PORT:
                    tables.listeners.remove(key)
        return nothing

    def _leave_cgroup(self) -> Restore:
        """The pod's processes go where no program sees them, for so long that a look at the status falls into it."""
        stray = self._node.cgroup / "stray"
        stray.mkdir(exist_ok=True)
        until = time.monotonic() + SAME_SECOND
        _move_all(self._pod.cgroup, stray)

        def come_back() -> None:
            time.sleep(max(0.0, until - time.monotonic()))
            _move_all(stray, self._pod.cgroup)

        return come_back


def _move_all(source: Path, to: Path) -> None:
    for process in (source / "cgroup.procs").read_text().split():
        with suppress(OSError):  # it has ended
            (to / "cgroup.procs").write_text(process)
