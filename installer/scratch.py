"""A node for one process, to try the real programs on: cgroup, bpffs and network namespace of its own.

The cgroup is the parent's to make and take down. All else is in namespaces of the child's own, so nothing outlives it,
however it ends; only an empty cgroup may, which the next trial removes.
"""

import ctypes
import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from bpf.attachment import attach_programs
from bpf.errors import KernelRefused
from bpf.kernel import cgroup2_root, own_cgroup
from bpf.pins import Pins
from bpf.probing import scratch
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, entries_of
from cni.netns.plumbing import prepare
from cni.netns.rtnl import LOCAL_TABLE, Rtnl
from cni.netns.sandbox import look
from cni.policy.annotations import CapturePolicy

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWNET = 0x20000, 0x40000000  # uapi/linux/sched.h
_RECURSIVE_PRIVATE = 0x44000  # MS_REC | MS_PRIVATE, uapi/linux/mount.h
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # uapi/linux/sockios.h, if.h
_PROXY = 1337
_LO = 1
POD = "192.0.2.1"  # for documentation (RFC 5737): it leads nowhere but into this namespace


def scratch_places(point: Path | None) -> list[Path]:
    """Where a scratch cgroup may be: below the attach point, or where this process is.

    In a container with a cgroup namespace of its own, a process can't be moved to a cgroup outside of it.
    """
    places = [point] if point else []
    try:
        own = own_cgroup(cgroup2_root())
    except KernelRefused:
        return places
    return [*places, own] if own and own != point else places


@contextmanager
def scratch_cgroup(parent: Path) -> Iterator[Path]:
    """An empty cgroup below `parent`; what is in it when it is left is killed. Raises KernelRefused."""
    stack = ExitStack()
    try:
        made = stack.enter_context(scratch.scratch_cgroup(parent))
    except OSError as error:
        raise KernelRefused(f"cgroup {error.filename or parent}: {error.strerror}") from error
    try:
        yield made
    finally:
        with suppress(OSError):
            (made / "cgroup.kill").write_text("1")
        with suppress(OSError):  # then the next trial removes it
            stack.close()


@dataclass(frozen=True)
class Scratch:
    """A node whose one pod is this process."""

    pins: Pins
    tables: Tables
    cookie: int


@contextmanager
def scratch_node(cgroup: Path, policy: CapturePolicy, local: Sequence[str] = ()) -> Iterator[Scratch]:
    """Move this process, for good, into a pod at POD; `local` are networks whose addresses are its own to bind.

    Raises OSError, SidestepError.
    """
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    if _LIBC.unshare(_NEWNS | _NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    _mount(b"none", Path("/"), None, _RECURSIVE_PRIVATE)
    with ExitStack() as stack:
        bpffs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=scratch.PREFIX)))
        _mount(b"bpf", bpffs, b"bpf", 0)
        stack.callback(_LIBC.umount, os.fsencode(bpffs))
        pins = Pins(bpffs)
        attach_programs(pins, cgroup)
        tables = stack.enter_context(Tables(pins))
        yield Scratch(pins, tables, _enrol(pins, tables, policy, local))


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int) -> None:
    if _LIBC.mount(source, os.fsencode(target), kind, flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: " + os.strerror(ctypes.get_errno()))


def _enrol(pins: Pins, tables: Tables, policy: CapturePolicy, local: Sequence[str]) -> int:
    """Make this very namespace a pod; returns its cookie."""
    _bring_up_lo()
    with Rtnl() as rtnl:
        rtnl.add_address(ip_address(POD), _LO)
        for network in local:
            rtnl.make_local(ip_network(network), _LO, LOCAL_TABLE, None)
        sandbox = look(rtnl)
        prepare(rtnl, sandbox, False, False)
    identity = Identity("probe", "probe", "probe", "probe", "", "lo")
    with Descriptor(os.open("/proc/self/ns/net", os.O_RDONLY)) as netns:
        Enrolments(pins, tables).add(sandbox.cookie, entries_of(identity, policy, sandbox, (_PROXY, _PROXY)), netns.fd)
    return sandbox.cookie


def _bring_up_lo() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(control, _GET_FLAGS, request)
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | _UP)
        fcntl.ioctl(control, _SET_FLAGS, request)
