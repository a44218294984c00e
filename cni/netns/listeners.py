"""Finds listening sockets that a pod's proxy bound before the pod was enrolled.

The programs mark the proxy's sockets when they are bound. A socket that was bound before has no mark. So nothing is
steered to it, even if it begins to listen later. This module copies such sockets from the proxy's processes. The caller
registers them, as sockops.c does with marked sockets.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from bpf.syscalls import Descriptor
from cni.netns.pidfd import copy_of, sockets_of
from cni.netns.proc_net import SocketRow, table_of_sockets
from cni.netns.processes import GONE
from cni.netns.sandbox import cookie_of_socket, visit
from cni.netns.sock_diag import LISTEN, Diag, TcpSocket

_PORTS = (INBOUND_PORT, OUTBOUND_PORT)


@dataclass(frozen=True)
class Proxy:
    """How to recognise a pod's proxy. The ids are those of the initial user namespace."""

    cookie: int
    uid: int
    gid: int
    container: str = ""  # id of the container that its processes are in; empty: the ids are enough


class Listener(NamedTuple):
    """A copy of a listening socket, which the receiver closes.

    `port` is in host order. `anywhere` means that the socket is bound to 0.0.0.0 or ::.
    """

    socket: socket.socket
    port: int
    anywhere: bool


def listeners_of(proxy: Proxy, pids: list[int], proc: Path) -> Iterator[Listener]:
    """The proxy's listeners among the sockets of `pids`, which are processes of one network namespace.

    IPv4 and IPv6 listeners take turns, so that both get a share of the slots. Processes and sockets that end meanwhile
    are left out. `proc` is a procfs of the node. Needs CAP_SYS_PTRACE and the node's pid namespace.
    """
    wanted = _listening_for_proxies(pids, proc)
    if not wanted:
        return
    found: dict[int, list[tuple[int, int, int]]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for pid in pids:
        for number, inode in sockets_of(proc, pid):
            if inode in wanted and _is_of_container(proc, pid, proxy.container):
                found[wanted.pop(inode)].append((pid, number, inode))
    for place in filter(None, chain.from_iterable(zip_longest(*found.values()))):
        with suppress(OSError), ExitStack() as undo:
            copy = undo.enter_context(copy_of(*place))
            if _is_listener(copy, proxy):
                undo.pop_all()
                address, port = copy.getsockname()[:2]
                yield Listener(copy, port, address in ("0.0.0.0", "::"))


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


def _listening_for_proxies(pids: list[int], proc: Path) -> dict[int, int]:
    """The sockets that listen on the proxy's ports in the namespace of these processes: inode → address family."""
    for pid in pids:
        with suppress(*GONE), Descriptor(os.open(proc / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)) as netns:
            return {
                each.inode: each.family for each in visit(netns.fd, lambda _: listening()) if each.local_port in _PORTS
            }
    return {}


def _is_of_container(proc: Path, pid: int, container: str) -> bool:
    with suppress(*GONE):
        return container in (proc / str(pid) / "cgroup").read_text()
    return False


def _is_listener(copy: socket.socket, proxy: Proxy) -> bool:
    """Whether a socket listens for this pod's proxy. It belongs to its opener's user and group, as in Istio's rules."""
    owner = os.fstat(copy.fileno())
    if cookie_of_socket(copy) != proxy.cookie or not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    return owner.st_uid == proxy.uid or owner.st_gid == proxy.gid
