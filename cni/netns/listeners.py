"""The listening sockets of proxies that are older than their pods' enrolment.

What the programs have not seen bound is not marked as the proxy's, so it is never steered to, even if it listens only
later. Such sockets are fetched from the process that has them and registered as sockops.c does with the marked ones.
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
from cni.netns.proc_net import SocketRow, table
from cni.netns.processes import GONE
from cni.netns.sandbox import cookie_of_socket, visit
from cni.netns.sock_diag import LISTEN, Diag, TcpSocket

_PORTS = (INBOUND_PORT, OUTBOUND_PORT)


@dataclass(frozen=True)
class Proxy:
    """Who is a pod's proxy; ids as the initial user namespace has them."""

    cookie: int
    uid: int
    gid: int
    container: str = ""  # only processes of this one; empty: anybody with the ids


class Listener(NamedTuple):
    """A copy of a listening socket, which whoever gets it closes; `anywhere` is whether it is bound to no address."""

    socket: socket.socket
    port: int
    anywhere: bool


def listeners_of(proxy: Proxy, pids: list[int], proc: Path) -> Iterator[Listener]:
    """The proxy's listeners among the sockets of a namespace's processes; both families get their share of the slots.

    Takes CAP_SYS_PTRACE and the node's process ids. What ends meanwhile is left out.
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
    """What listens in the calling thread's namespace.

    sock_diag(7) goes over listeners alone. net/tcp goes over every bucket of the machine's table of connections, which
    takes milliseconds each time; it is for kernels without tcp_diag.
    """
    try:
        with Diag() as diag:
            return list(diag.sockets(LISTEN))
    except OSError:
        return [each for each in chain(table("tcp"), table("tcp6")) if each.state == LISTEN]


def _listening_for_proxies(pids: list[int], proc: Path) -> dict[int, int]:
    """Inode → family of what listens on the proxy's ports in the namespace that all these processes are in."""
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
    """Whether it listens for this pod's proxy. It belongs to whoever opened it, as Istio's owner rules have it."""
    owner = os.fstat(copy.fileno())
    if cookie_of_socket(copy) != proxy.cookie or not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    return owner.st_uid == proxy.uid or owner.st_gid == proxy.gid
