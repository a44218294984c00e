"""Finds network namespaces of this node by cookie.

The agent keeps no descriptors of namespaces, because a descriptor would keep a deleted pod's namespace alive. Instead
it searches the places where a namespace in use must be: container runtimes mount it on a file, or a process is in it.
"""

import os
import re
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bpf.errors import SidestepError
from bpf.kernel import capabilities
from bpf.syscalls import Descriptor
from cni.errors import SandboxInvalid
from cni.netns.processes import GONE
from cni.netns.sandbox import own_cookie, visit

PROC = Path("/proc")
# numbers from uapi/linux/capability.h: to see namespaces of other users' processes, and to enter namespaces
_LOOKING = ((19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN"))


class NoProcfs(SidestepError):
    """The directory given as the node's procfs is not one."""


def why_absent(proc: Path) -> str:
    """A sentence for a namespace that was not found: the likely reason, and what to do."""
    if missing := missing_rights():
        return f"network namespace not found without {' and '.join(missing)}; run as root with all capabilities"
    return f"network namespace not found below {proc}; give a procfs of the node with --proc"


def missing_rights() -> list[str]:
    """The capabilities that find_netns() needs and this process lacks."""
    effective = capabilities()
    return [name for bit, name in _LOOKING if not effective >> bit & 1]


@contextmanager
def find_netns(
    cookies: Collection[int], inodes: Collection[int] | None = None, proc: Path = PROC
) -> Iterator[Iterator[tuple[int, int]]]:
    """Look for the namespaces of `cookies`. Gives an iterator over (cookie, descriptor) of those that were found.

    A descriptor is valid until the iterator's next step. A namespace keeps its inode for life: if the `inodes` of all
    `cookies` are given, no other namespace is entered. `proc` is a procfs of the node; inside a container, /proc is
    not. Needs CAP_SYS_PTRACE to see the namespaces of other users' processes, and CAP_SYS_ADMIN to enter a namespace
    and read its cookie. Raises OSError, NoProcfs.
    """
    with closing(_search(set(cookies), inodes, proc)) as found:
        yield found


def unused(inodes: Collection[int], proc: Path = PROC) -> set[int]:
    """Which of these namespaces, given by inode, no process of the node is in and nothing is mounted on.

    `proc` is a procfs of the node. Raises OSError.
    """
    left = set(inodes)
    for _, inode in _places(proc) if left else ():
        left.discard(inode)
        if not left:
            break
    return left


def _search(left: set[int], inodes: Collection[int] | None, proc: Path) -> Generator[tuple[int, int], None, None]:
    seen = {_own_inode(proc)}
    for path, inode in _places(proc):
        if not left:
            return
        if inode in seen or (inodes is not None and inode not in inodes):
            continue
        try:
            opened = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except GONE:
            continue  # another path may lead to the same namespace
        with opened as netns:
            if os.fstat(netns.fd).st_ino != inode:  # something else is mounted over it, or the process has changed
                continue
            try:
                cookie = visit(netns.fd, lambda _: own_cookie())
            except SandboxInvalid:
                continue
            seen.add(inode)
            if cookie in left:
                left.discard(cookie)
                yield cookie, netns.fd


def _own_inode(proc: Path) -> int:
    try:
        return (proc / "self/ns/net").stat().st_ino
    except GONE as error:
        raise NoProcfs(
            f"{proc} is no procfs of this node; give one with --proc: /proc on the node, /host/proc in the agent's "
            "container"
        ) from error


def _places(proc: Path) -> Iterator[tuple[Path, int]]:
    """The paths where namespaces can be opened, each with its inode. Many paths may lead to one namespace."""
    mount_namespaces = set()
    for name in ("self", "1"):  # in a container, the runtime's mounts are seen only through the node's first process
        try:
            mount_namespace = (proc / name / "ns/mnt").stat().st_ino
            if mount_namespace not in mount_namespaces:
                mount_namespaces.add(mount_namespace)
                yield from _mounted((proc / name / "mountinfo").read_bytes(), proc / name / "root")
        except GONE:
            continue
    for process in proc.iterdir():
        if process.name.isdigit():
            place = process / "ns/net"
            try:
                inode = place.stat().st_ino
            except GONE:
                continue
            yield place, inode


def _mounted(mountinfo: bytes, root: Path) -> Iterator[tuple[Path, int]]:
    """The mounted network namespaces: proc_pid_mountinfo(5), field 4 is net:[inode], field 5 the path below `root`."""
    for line in mountinfo.splitlines():
        if b" net:[" in line and b" - nsfs " in line:
            _, _, _, name, place, *_ = line.split(b" ")
            # blanks, backslashes and line ends are written as a backslash and three octal digits
            plain = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), place)
            yield root / os.fsdecode(plain.lstrip(b"/")), int(name[5:-1])
