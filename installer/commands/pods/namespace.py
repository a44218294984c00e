"""Reads an enrolled pod's network namespace: its interfaces and its listening sockets. Changes nothing there."""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal, NamedTuple

from cni.errors import SandboxInvalid
from cni.netns.listeners import listening, taking_datagrams
from cni.netns.namespaces import find_netns
from cni.netns.proc_net import SocketRow
from cni.netns.rtnl import Rtnl
from cni.netns.sandbox import visit
from cni.netns.sock_diag import TcpSocket
from cni.netns.userns import outside_ids
from cni.policy.decision import IPAddress
from installer.commands.pods.enrolled_pods import EnrolledPod

_FIRST = (IPv4Address("127.0.0.1"), IPv6Address("::1"))


class Listening(NamedTuple):
    """A TCP socket that listens, or a UDP socket that takes datagrams. `uid` is its user's, as the node sees it."""

    ip: IPAddress
    port: int
    uid: int


@dataclass(frozen=True)
class NamespaceView:
    """What was seen in one namespace."""

    netns_fd: int  # open while the view is valid
    interfaces: Mapping[int, str]
    listening: tuple[Listening, ...]

    def listeners(self, port: int) -> list[str]:
        """The addresses of the sockets that listen on a port, one for each socket."""
        return [str(each.ip) for each in self.listening if each.port == port]

    def is_heard(self, port: int) -> bool:
        """Whether somebody listens on a port of 127.0.0.1 or ::1, as the programs look for the outbound listener."""
        return any(each.port == port and (each.ip.is_unspecified or each.ip in _FIRST) for each in self.listening)

    def users(self, port: int) -> list[int]:
        """The users of the sockets that listen on a port, each once."""
        return sorted({each.uid for each in self.listening if each.port == port})

    def of(self, protocol: Literal["tcp", "udp"]) -> tuple[Listening, ...] | None:
        """The sockets that take connections or datagrams; None if they can't be looked at. UDP is looked at now."""
        if protocol == "tcp":
            return self.listening
        try:
            return _sorted(visit(self.netns_fd, lambda _: taking_datagrams()))
        except (OSError, SandboxInvalid):
            return None

    def outside_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """A user and group of the pod as the maps have them. Raises SandboxInvalid if the pod does not have them."""
        return outside_ids(self.netns_fd, uid, gid)


def looks_into(
    pods: Collection[EnrolledPod], proc: Path
) -> Generator[tuple[EnrolledPod, NamespaceView | None], None, None]:
    """Each pod with a view of its namespace, or None if the namespace is not found.

    A view is valid until the next one is asked for. `proc` is a procfs of the node; it is walked once for all pods.
    """
    left = {pod.cookie: pod for pod in pods}
    inodes = {pod.inode for pod in pods}
    with find_netns(left.keys(), inodes if 0 not in inodes else None, proc) as found:
        for cookie, netns_fd in found:
            try:
                view = look_into(netns_fd)
            except SandboxInvalid:
                continue
            yield left.pop(cookie), view
    for pod in left.values():
        yield pod, None


def look_into(netns_fd: int) -> NamespaceView:
    """A view of the namespace of a descriptor, valid while that is open. Raises SandboxInvalid."""
    interfaces, found = visit(netns_fd, _look)
    return NamespaceView(netns_fd, interfaces, found)


@contextmanager
def looked_into(pod: EnrolledPod, proc: Path) -> Iterator[NamespaceView | None]:
    """The same for one pod. The view is valid until the context ends."""
    with closing(looks_into([pod], proc)) as looks:
        yield next(inside for _, inside in looks)


def _look(rtnl: Rtnl) -> tuple[dict[int, str], tuple[Listening, ...]]:
    interfaces = {index: name for name, index in rtnl.links()}
    return interfaces, _sorted(listening())


def _sorted(sockets: Iterable[TcpSocket | SocketRow]) -> tuple[Listening, ...]:
    found = (Listening(each.local_ip, each.local_port, each.uid) for each in sockets)
    return tuple(sorted(found, key=lambda each: (each.port, each.ip.version, int(each.ip))))
