"""Makes one connection in a child process with a pod's namespace, cgroup and user, and reports what it saw.

The programs hide from a process where its captured connection really goes. /proc/net/tcp and udp of the namespace show
it.
"""

import errno
import json
import os
import select
import signal
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TextIO

from bpf.errors import SidestepError
from cni.netns.proc_net import family_of, rows
from cni.policy.decision import TPROXY_MARK, IPAddress

CONNECT_SECONDS = 2.0
# what the child may take for everything else
_CHILD_SECONDS = 5.0
_CLONE_NEWNET = 0x40000000
_IPV6_TRANSPARENT = 75  # uapi/linux/in6.h


class CannotTry(SidestepError):
    """The connection could not even be tried."""


@dataclass(frozen=True)
class Dial:
    """A connection to make: where to, as which user, and what to bind the socket to."""

    destination: IPAddress
    port: int
    protocol: str
    uid: int
    gid: int
    source: IPAddress | None = None
    mark: int = 0
    interface: str | None = None


@dataclass(frozen=True)
class Attempted:
    """The outcome. `dialled` is where the kernel sent the connection; None if it ended before anybody could look."""

    error: int  # errno, 0 when it is connected
    dialled: tuple[str, int] | None
    peer: tuple[str, int] | None  # getpeername()
    local: tuple[str, int] | None  # getsockname()

    @property
    def words(self) -> str:
        """For people."""
        if self.error == 0:
            return "connected"
        if self.error == errno.ETIMEDOUT:
            return f"no answer within {CONNECT_SECONDS:g} s"
        return f"{os.strerror(self.error)} ({errno.errorcode.get(self.error, self.error)})"


def dial(what: Dial, netns_fd: int | None, cgroup: Path | None) -> Attempted:
    """Make the connection and close it again. A namespace or cgroup that is None is our own. Raises CannotTry.

    UDP is connect() alone: nothing is sent. Needs CAP_SYS_ADMIN for the namespace, CAP_SETUID and CAP_SETGID.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(what, netns_fd, cgroup, writer)
    os.close(writer)
    try:
        told = json.loads(_read(reader) or "{}")
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if "failed" in told or not told:
        raise CannotTry(f"the connection cannot be tried: {told.get('failed', 'its process has ended')}")
    ends = {name: told[name] and (told[name][0], told[name][1]) for name in ("dialled", "peer", "local")}
    return Attempted(told["error"], **ends)


def _read(reader: int) -> bytes:
    """Everything that the child writes before its time is up."""
    text = b""
    while select.select([reader], [], [], CONNECT_SECONDS + _CHILD_SECONDS)[0]:
        part = os.read(reader, 65536)
        if not part:
            break
        text += part
    return text


def _child(what: Dial, netns_fd: int | None, cgroup: Path | None, writer: int) -> None:
    """Runs in the child. It never returns and raises nothing: the parent's code must not run twice."""
    stage = ["starting"]
    try:
        told: dict[str, Any] = _work(what, netns_fd, cgroup, stage)
    except OSError as error:
        advice = ""
        if error.errno == errno.EPERM:
            is_user = stage[0].startswith("becoming")
            advice = "; give the container SETUID and SETGID" if is_user else ""
            advice += f"{',' if is_user else ';'} {'or ' * is_user}run this as root on the node itself"
        told = {"failed": f"{stage[0]}: {error.strerror}{advice}"}
    except BaseException as error:
        told = {"failed": f"{stage[0]}: {error!r}"}
    try:
        os.write(writer, json.dumps(told).encode())
    finally:
        os._exit(0)


def _work(what: Dial, netns_fd: int | None, cgroup: Path | None, stage: list[str]) -> dict[str, Any]:
    if cgroup is not None:
        stage[0] = f"joining {cgroup}"
        (cgroup / "cgroup.procs").write_text("0")
    if netns_fd is not None:
        stage[0] = "entering the pod's network namespace"
        _enter(netns_fd)
    name = what.protocol + ("6" if family_of(what.destination) == socket.AF_INET6 else "")
    with Path("/proc/thread-self/net", name).open() as table:
        stage[0] = f"becoming uid {what.uid} gid {what.gid}"
        _leave_groups()
        _become(what.uid, what.gid)
        kind = socket.SOCK_STREAM if what.protocol == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family_of(what.destination), kind) as client:
            _become(0, 0)
            stage[0] = "setting up the socket"
            _prepare(client, what)
            _become(what.uid, what.gid)
            stage[0] = "connecting"
            return asdict(_connect(client, what, table))


def _enter(netns_fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(netns_fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _become(uid: int, gid: int) -> None:
    """Become a user and group. Root stays the saved id, so that the child can become root again."""
    os.setresuid(0, 0, 0)
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)


def _leave_groups() -> None:
    """Drop the further groups. Without CAP_SETGID they stay: the programs look at a process's first group only."""
    with suppress(PermissionError):
        os.setgroups([])


def _prepare(client: socket.socket, what: Dial) -> None:
    if what.interface is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, what.interface.encode())
    if what.mark:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, what.mark)
    if what.mark == TPROXY_MARK:  # as the proxy, which dials with its client's address
        ip6 = client.family == socket.AF_INET6
        level, option = (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT) if ip6 else (socket.SOL_IP, socket.IP_TRANSPARENT)
        client.setsockopt(level, option, 1)
    if what.source is not None:
        client.bind((str(what.source), 0))


def _connect(client: socket.socket, what: Dial, table: TextIO) -> Attempted:
    client.setblocking(False)
    error = client.connect_ex((str(what.destination), what.port))
    dialled = _dialled(client, table)
    if error == errno.EINPROGRESS:
        _, writable, _ = select.select([], [client], [], CONNECT_SECONDS)
        error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if writable else errno.ETIMEDOUT
    dialled = dialled or _dialled(client, table)
    peer = None
    if error == 0:
        with suppress(OSError):  # the other end may have closed it already
            peer = _end(client.getpeername())
    return Attempted(error, dialled, peer, _end(client.getsockname()))


def _dialled(client: socket.socket, table: TextIO) -> tuple[str, int] | None:
    inode = os.fstat(client.fileno()).st_ino
    table.seek(0)
    row = next((row for row in rows(table) if row.inode == inode), None)
    return (str(row.remote_ip), row.remote_port) if row and row.remote_port else None


def _end(name: Any) -> tuple[str, int]:
    ip = ip_address(name[0].partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip), int(name[1])
