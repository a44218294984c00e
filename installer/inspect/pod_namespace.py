"""What is to be seen in an enrolled pod's network namespace: interfaces, and who listens. Nothing is changed there."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cni.decision import IPAddress
from cni.errors import SandboxInvalid
from cni.ids import outside_ids
from cni.namespaces import open_netns
from cni.rtnl import Rtnl
from cni.sandbox import visit
from installer.inspect.enrolled import Enrolled
from installer.inspect.sockets import LISTENING, rows


@dataclass(frozen=True)
class Inside:
    """One look."""

    netns_fd: int  # good while the look lasts
    interfaces: Mapping[int, str]
    listening: tuple[tuple[IPAddress, int], ...]  # TCP

    def listeners(self, port: int) -> list[str]:
        """The addresses on which somebody listens on a port."""
        return [str(ip) for ip, each in self.listening if each == port]

    def outside_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """A user and group of the pod as the maps have them. Raises SandboxInvalid for those it does not have."""
        return outside_ids(self.netns_fd, uid, gid)


@contextmanager
def looked_into(pod: Enrolled, proc: Path) -> Iterator[Inside | None]:
    """A look into the pod's namespace; None when it is not found below `proc`, a procfs of the node."""
    with open_netns(pod.cookie, pod.inode or None, proc) as found:
        # what was found is good for a moment only
        netns = None if found is None else os.dup(found)
    if netns is None:
        yield None
        return
    try:
        try:
            interfaces, listening = visit(netns, _look)
        except SandboxInvalid:
            yield None
            return
        yield Inside(netns, interfaces, listening)
    finally:
        os.close(netns)


def _look(rtnl: Rtnl) -> tuple[dict[int, str], tuple[tuple[IPAddress, int], ...]]:
    interfaces = {index: name for name, index in rtnl.links()}
    listening = []
    for name in ("tcp", "tcp6"):
        path = Path("/proc/thread-self/net") / name
        if path.exists():  # without IPv6 there is one of them
            with path.open() as lines:
                listening += [(row.local, row.local_port) for row in rows(lines) if row.state == LISTENING]
    return interfaces, tuple(sorted(listening, key=lambda each: (each[1], each[0].version, int(each[0]))))
