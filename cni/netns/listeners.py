"""Finds a proxy's listening sockets that the programs have not seen begin to listen.

The programs mark the proxy's sockets when they are bound. A socket that was bound before the pod was enrolled has no
mark. A strict pod's proxy may listen before its container is known. So nothing is steered to such sockets, until this
module finds them. There are two ways to find them: the kernel's iterator over sockets (bpf/iterator.py), and, where the
kernel does not take that program, copies from the processes that have the sockets.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from bpf.iterator import SocketIterator
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, FoundListener
from cni.netns.pidfd import copy_of, sockets_of
from cni.netns.proc_net import SocketRow, table_of_sockets
from cni.netns.processes import GONE
from cni.netns.sandbox import cookie_of_socket, visit
from cni.netns.sock_diag import CLOSE, LISTEN, Diag, TcpSocket
from cni.policy.ambient_decision import MARK_BITS, ZTUNNEL_MARK

FAMILIES = (socket.AF_INET, socket.AF_INET6)
_PORTS = (INBOUND_PORT, OUTBOUND_PORT)
_ANYWHERE = ("0.0.0.0", "::")
_SO_COOKIE = 57  # uapi/asm-generic/socket.h, Linux 4.12


@dataclass(frozen=True)
class Proxy:
    """How to recognise a pod's proxy. The ids are those of the initial user namespace.

    A strict proxy must also be in its container: `cgroup` is the id of the container's cgroup2 directory, and
    `container` is the id that the paths of its processes' cgroups have. Otherwise both are empty.
    """

    cookie: int
    uid: int
    gid: int
    cgroup: int = 0
    container: str = ""

    def has_opened(self, found: FoundListener) -> bool:
        """Whether the proxy has opened a socket: by its user or its group, as in Istio's rules; in its container."""
        opener = found.opener
        if self.cgroup and opener.cgroup != self.cgroup:
            return False
        return bool(opener.uid == self.uid or opener.gid == self.gid)

    def owns(self, copy: socket.socket) -> bool:
        """The same of a copied socket of a process in its container. The opener's user and group own a socket."""
        owner = os.fstat(copy.fileno())
        return owner.st_uid == self.uid or owner.st_gid == self.gid


@dataclass(frozen=True)
class Ztunnel:
    """How to recognise ztunnel's sockets in a pod in ambient mode: by their mark, and by the container they are of.

    `cgroups` are the ids of the cgroup2 directories of the node's ztunnels; None if the mark is enough.
    """

    cookie: int
    cgroups: frozenset[int] | None = None
    container: str = ""  # whoever looks at processes looks at ztunnel's own

    def has_opened(self, found: FoundListener) -> bool:
        """Whether a ztunnel has opened a socket."""
        return found.mark & MARK_BITS == ZTUNNEL_MARK and (self.cgroups is None or found.opener.cgroup in self.cgroups)

    def owns(self, copy: socket.socket) -> bool:
        """The same of a copied socket of one of ztunnel's processes."""
        return copy.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & MARK_BITS == ZTUNNEL_MARK


class Listener(NamedTuple):
    """A listening socket by its cookie.

    `port` is in host order. `anywhere` means that the socket is bound to 0.0.0.0 or ::. `copy` is there if the socket
    was copied from a process.
    """

    cookie: int
    family: int
    port: int
    anywhere: bool
    copy: socket.socket | None = None


def listening() -> list[TcpSocket | SocketRow]:
    """The listening TCP sockets of the calling thread's namespace.

    sock_diag(7) visits listeners only. Reading net/tcp visits every bucket of the machine's connection table, which
    takes milliseconds each time. So net/tcp is read only if the kernel has no tcp_diag.
    """
    try:
        with Diag() as diag:
            return list(diag.sockets(LISTEN))
    except OSError:
        return [each for each in chain(table_of_sockets("tcp"), table_of_sockets("tcp6")) if each.state == LISTEN]


def taking_datagrams() -> list[SocketRow]:
    """The UDP sockets of the calling thread's namespace that take datagrams from anybody: bound and not connected."""
    try:
        with Diag() as diag:
            return list(diag.datagram_sockets())
    except OSError:
        return [each for each in chain(table_of_sockets("udp"), table_of_sockets("udp6")) if each.state == CLOSE]


def on_proxys_ports(netns: int) -> list[TcpSocket | SocketRow]:
    """The sockets that listen on the proxy's ports in a namespace, whoever has them. Raises SandboxInvalid."""
    return [each for each in visit(netns, lambda _: listening()) if each.local_port in _PORTS]


def by_iterator(iterator: SocketIterator, proxy: Proxy | Ztunnel, netns: int) -> list[Listener]:
    """The proxy's listeners, as the kernel's iterator finds them. Raises KernelRefused, SandboxInvalid."""
    return [
        Listener(each.socket, each.family, each.port, str(each.local.ip()) in _ANYWHERE)
        for each in visit(netns, lambda _: iterator.found())
        if proxy.has_opened(each)
    ]


@contextmanager
def by_processes(
    proxy: Proxy | Ztunnel, wanted: Iterable[TcpSocket | SocketRow], pids: Iterable[int], proc: Path
) -> Iterator[list[Listener]]:
    """Copies of the proxy's listeners among the sockets of `pids`, which are closed at the end of the with block.

    Processes and sockets that end meanwhile are left out. `proc` is a procfs of the node. Needs CAP_SYS_PTRACE and the
    node's pid namespace.
    """
    inodes = {each.inode for each in wanted}
    with ExitStack() as copies:
        found = []
        for pid in pids if inodes else ():
            for number, inode in sockets_of(proc, pid):
                if inode in inodes and _is_of_container(proc, pid, proxy.container):
                    inodes.discard(inode)
                    with suppress(OSError):
                        copy = copies.enter_context(copy_of(pid, number, inode))
                        if _is_listener(copy, proxy):
                            address, port = copy.getsockname()[:2]
                            (cookie,) = struct.unpack("=Q", copy.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))
                            found.append(Listener(cookie, copy.family, port, address in _ANYWHERE, copy))
        yield found


def _is_of_container(proc: Path, pid: int, container: str) -> bool:
    with suppress(*GONE):
        return container in (proc / str(pid) / "cgroup").read_text()
    return False


def _is_listener(copy: socket.socket, proxy: Proxy | Ztunnel) -> bool:
    """Whether a socket listens for this pod's proxy."""
    if cookie_of_socket(copy) != proxy.cookie or not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    return proxy.owns(copy)
