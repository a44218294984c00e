"""Resets open connections of a pod that its denied ports would refuse now."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from bpf.layout import OUTBOUND_PORT, SPREAD4, SPREAD6
from cni.errors import SandboxInvalid
from cni.netns.pidfd import copy_of, sockets_of
from cni.netns.proc_net import endpoint
from cni.netns.processes import Crowd
from cni.netns.sandbox import visit
from cni.netns.sock_diag import CONNECTED, LISTEN, Diag, TcpSocket

Address = IPv4Address | IPv6Address

_ADVICE = {
    errno.EOPNOTSUPP: "this kernel cannot reset connections (no CONFIG_INET_DIAG_DESTROY); restart the pod",
    errno.EPERM: "not permitted; run as root with CAP_SYS_ADMIN and CAP_NET_ADMIN, on the node itself",
}


@dataclass(frozen=True)
class Denied:
    """The ports that a pod denies, and its own addresses. Connections with those are never denied."""

    outbound: frozenset[int]
    inbound: frozenset[int]
    own: frozenset[Address]

    def covers(self, *, is_inbound: bool, local_port: int, remote: Address, remote_port: int) -> bool:
        """Whether a connection would be refused now: only its server's port counts.

        If the connection is captured, `remote` is its original destination.
        """
        if remote.is_loopback or remote in self.own:
            return False
        return local_port in self.inbound if is_inbound else remote_port in self.outbound


@dataclass(frozen=True)
class Closed:
    """The far ends of the connections that were reset, and the problem that stopped the work ("": none)."""

    destinations: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class _Doomed:
    socket: TcpSocket
    destination: str


def close_denied(netns: int, crowd: Crowd, denied: Denied, proc: Path) -> Closed:
    """Reset every denied connection of a namespace. A failure is returned, not raised: other pods get their turn."""
    try:
        every = visit(netns, lambda _: list(_sockets()))
        doomed = list(_denied(every, crowd, denied, proc))
        return visit(netns, lambda _: _destroyed(doomed))
    except SandboxInvalid as error:
        return Closed(problem=_told(error.__cause__ or error))


def _sockets() -> Iterator[TcpSocket]:
    with Diag() as diag:
        yield from diag.sockets(*CONNECTED, LISTEN)


def _denied(every: list[TcpSocket], crowd: Crowd, denied: Denied, proc: Path) -> Iterator[_Doomed]:
    """The connections to reset. A captured one is judged by its original destination.

    Captured ones come first. If the proxy's own connection to the server were reset first, the proxy would close the
    captured one in an orderly way, and the application would take that for a normal end.
    """
    listening = {each.local_port for each in every if each.state == LISTEN}
    connected = [each for each in every if each.state != LISTEN]
    originals = dict(_originals({each.inode for each in connected if _is_captured(each)}, crowd, proc))
    for each in sorted(connected, key=lambda each: each.inode not in originals):
        remote, port = originals.get(each.inode, (each.remote_ip, each.remote_port))
        is_inbound = _is_inbound(each, listening)
        if denied.covers(is_inbound=is_inbound, local_port=each.local_port, remote=remote, remote_port=port):
            yield _Doomed(each, endpoint(remote, port))


def _is_inbound(each: TcpSocket, listening: Collection[int]) -> bool:
    """Whether the pod accepted the connection, and did not open it.

    Listening sockets are no proof: what the proxy accepts keeps its original port, and nobody has to listen there. So
    the kernel's word comes first. Without it, the lower port is the server's, because ephemeral ports are high.
    """
    if each.has_dialled is not None:
        return not each.has_dialled
    return each.local_port in listening or each.local_port < each.remote_port


def _destroyed(doomed: list[_Doomed]) -> Closed:
    gone = []
    try:
        with Diag() as diag:
            for each in doomed:
                if diag.destroy(each.socket):
                    gone.append(each.destination)
    except OSError as error:
        return Closed(tuple(gone), _told(error))
    return Closed(tuple(gone))


def _told(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return _ADVICE.get(number, os.strerror(number)) if number else str(error)


def _is_captured(each: TcpSocket) -> bool:
    to = each.remote_ip
    return each.remote_port == OUTBOUND_PORT and (to.is_loopback or to in SPREAD4 or to in SPREAD6)


def _originals(captured: set[int], crowd: Crowd, proc: Path) -> Iterator[tuple[int, tuple[Address, int]]]:
    """Inode and original destination of each captured socket. The socket's own getpeername() tells the destination."""
    for pid in crowd.pids if captured else ():
        for number, inode in sockets_of(proc, pid):
            if inode in captured:
                with suppress(OSError), copy_of(pid, number, inode) as copy:
                    host, port = copy.getpeername()[:2]
                    address = ip_address(host)
                    yield inode, (getattr(address, "ipv4_mapped", None) or address, port)
