"""A scratch node for one process, to try the real programs: a cgroup, a bpffs and a network namespace of its own.

The parent process makes and removes the cgroup. Everything else is in namespaces of the child process, so it vanishes
with the child. If the parent is killed, an empty cgroup stays, which the next trial removes. If the child is killed, an
empty temporary directory stays.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from bpf.attachment import attach_programs
from bpf.errors import KernelRefused
from bpf.kernel import cgroup2_root, own_cgroup
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, entries_of
from cni.netns.plumbing import prepare
from cni.netns.rtnl import LOCAL_TABLE, Rtnl
from cni.netns.sandbox import look
from cni.policy.annotations import CapturePolicy

PREFIX = "sidestep-trial-"
_REMOVAL_SECONDS = 2.0  # time for a child's cgroup to become empty; the kernel takes milliseconds
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWNET = 0x20000, 0x40000000  # uapi/linux/sched.h
_RECURSIVE_PRIVATE = 0x44000  # MS_REC | MS_PRIVATE, uapi/linux/mount.h
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # uapi/linux/sockios.h, if.h
_PROXY = 1337
_LO = 1
# the pod's addresses. They are for documentation (RFC 5737, RFC 3849): no packet to them leaves the namespace
POD, POD6 = "192.0.2.1", "2001:db8::1"


def scratch_places(point: Path | None) -> list[Path]:
    """The cgroups below which to try to make a scratch cgroup: first the attach point, then this process's own.

    The second is for containers with their own cgroup namespace: processes can't be moved to a cgroup outside of it.
    """
    places = [point] if point else []
    try:
        own = own_cgroup(cgroup2_root())
    except KernelRefused:
        return places
    return [*places, own] if own and own != point else places


@contextmanager
def scratch_cgroup(parent: Path) -> Iterator[Path]:
    """Make an empty cgroup below `parent`; at the end, kill the processes in it and remove it. Raises KernelRefused."""
    stack = ExitStack()
    try:
        made = stack.enter_context(_scratch(parent, _remove_cgroup))
    except OSError as error:
        raise KernelRefused(f"cgroup {error.filename or parent}: {error.strerror}") from error
    try:
        yield made
    finally:
        with suppress(OSError):
            (made / "cgroup.kill").write_text("1")
        with suppress(OSError):  # if this fails, the next trial removes the cgroup
            stack.close()


@contextmanager
def scratch_pins(bpffs: Path) -> Iterator[Path]:
    """Make a directory on a bpffs; at the end, remove it with its pins. Raises OSError if it can't be made."""
    with _scratch(bpffs, shutil.rmtree) as path:
        yield path


@contextmanager
def _scratch(below: Path, remove: Callable[[Path], None]) -> Iterator[Path]:
    """A directory that is locked while in use, so that other trials can tell it from leftovers of a killed trial."""
    _clear_leftovers(below, remove)
    path, fd = _make_locked(below)
    with Descriptor(fd):
        try:
            yield path
        finally:
            remove(path)


def _make_locked(below: Path) -> tuple[Path, int]:
    while True:
        path = below / f"{PREFIX}{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return path, fd
            os.close(fd)  # another trial took it for a leftover and removed it before it was locked


def _clear_leftovers(below: Path, remove: Callable[[Path], None]) -> None:
    for path in below.glob(f"{PREFIX}*"):
        with suppress(OSError), Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            fcntl.flock(directory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)


def _remove_cgroup(path: Path) -> None:
    """Remove a cgroup; tries again while the last process is leaving. Raises OSError after _REMOVAL_SECONDS."""
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        try:
            return path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


@dataclass(frozen=True)
class Scratch:
    """A node whose only pod is this process; `cookie` is that of its network namespace, `cgroup` is where it is."""

    cgroup: Path
    pins: Pins
    tables: Tables
    cookie: int
    captures_ipv6: bool


@contextmanager
def scratch_node(cgroup: Path, policy: CapturePolicy, local: Sequence[str] = ()) -> Iterator[Scratch]:
    """Turn this process into a pod with the address POD; it can't go back. Sockets can bind addresses of `local`.

    With a dual-stack policy the pod has the address POD6 too, unless IPv6 is off. Raises OSError, SidestepError.
    """
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    if _LIBC.unshare(_NEWNS | _NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    _mount(b"none", Path("/"), None, _RECURSIVE_PRIVATE)
    with ExitStack() as stack:
        bpffs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        _mount(b"bpf", bpffs, b"bpf", 0)
        stack.callback(_LIBC.umount, os.fsencode(bpffs))
        pins = Pins(bpffs)
        attach_programs(pins, cgroup)
        tables = stack.enter_context(Tables(pins))
        yield _enrol(cgroup, pins, tables, policy, local)


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int) -> None:
    if _LIBC.mount(source, os.fsencode(target), kind, flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: " + os.strerror(ctypes.get_errno()))


def _enrol(cgroup: Path, pins: Pins, tables: Tables, policy: CapturePolicy, local: Sequence[str]) -> Scratch:
    """Enrol the network namespace of this process as a pod."""
    _bring_up_lo()
    versions = (4, 6) if policy.dual_stack and _has_ipv6() else (4,)
    with Rtnl() as rtnl:
        for address in map(ip_address, (POD, POD6)):
            if address.version in versions:
                rtnl.add_address(address, _LO)
        for network in map(ip_network, local):
            if network.version in versions:
                rtnl.make_local(network, _LO, LOCAL_TABLE, None)
        # nothing leaves this namespace, so every connection would be unreachable: let its routes be unknown
        sandbox = replace(look(rtnl), ways={}, loopback_stays=False)
        ipv6 = sandbox.captures_ipv6(policy.dual_stack)
        prepare(rtnl, sandbox, ipv6)
    identity = Identity("probe", "probe", "probe", "probe", "", "lo")
    with Descriptor(os.open("/proc/self/ns/net", os.O_RDONLY)) as netns:
        Enrolments(pins, tables).add(sandbox.cookie, entries_of(identity, policy, sandbox, (_PROXY, _PROXY)), netns.fd)
    return Scratch(cgroup, pins, tables, sandbox.cookie, ipv6)


def _has_ipv6() -> bool:
    """Whether IPv6 is on in this namespace: then lo has ::1."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


def _bring_up_lo() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(control, _GET_FLAGS, request)
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | _UP)
        fcntl.ioctl(control, _SET_FLAGS, request)
