"""Finds the cgroup2 directories of the node's processes.

A path in /proc/PID/cgroup begins at the root of the reader's cgroup namespace. In a container that is the container's
own cgroup, and other cgroups have paths such as /../../kubepods. So they are read by a thread that has entered the
cgroup namespace of the node's first process.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from bpf.kernel import cgroup2_root, mounts
from bpf.syscalls import Descriptor

T = TypeVar("T")

_CLONE_NEWCGROUP = 0x02000000  # uapi/linux/sched.h
_LIBC = ctypes.CDLL(None, use_errno=True)
# cgroup2's line in /proc/PID/cgroup, cgroups(7); on a hybrid host there are lines of version 1 as well
_LINE = "0::"


class Cgroup(NamedTuple):
    """A cgroup of version 2.

    `path` is its path below the mount, which names it to people. `lineage` has the ids of this cgroup and of all that
    are above it. A cgroup's id is its directory's inode.
    """

    path: str
    directory: Path
    lineage: frozenset[int]


class NotShown(Exception):
    """A process is in a cgroup that the mount of cgroup2 does not show."""


class Cgroups:
    """The cgroups of a node. Only from_node() makes one."""

    def __init__(self, mounted: Path, shown: str) -> None:
        """`mounted` is where cgroup2 is mounted, and `shown` the path of the cgroup that is the root of this mount."""
        self._mounted, self._shown = mounted, shown
        self._known: dict[str, Cgroup] = {}

    def of(self, process: Path) -> Cgroup:
        """The cgroup of a process, given by its directory in procfs.

        Raises OSError if the process or the cgroup has gone, and NotShown.
        """
        lines = _read(process / "cgroup").decode(errors="surrogateescape").splitlines()
        path = next((line.removeprefix(_LINE) for line in lines if line.startswith(_LINE)), "")
        if path not in self._known:
            self._known[path] = self._look(path)
        return self._known[path]

    def _look(self, path: str) -> Cgroup:
        outside = NotShown(f"its cgroup2 is {path or 'none'}, which the mount at {self._mounted} does not show")
        try:
            below = PurePosixPath(path).relative_to(self._shown)
        except ValueError:
            raise outside from None
        if ".." in below.parts:  # above the root of the cgroup namespace that it was read in
            raise outside
        directory = self._mounted / below
        above = [directory, *(each for each in directory.parents if each.is_relative_to(self._mounted))]
        return Cgroup(f"/{below}" if below.parts else "/", directory, frozenset(each.stat().st_ino for each in above))


def from_node(proc: Path, work: Callable[[Cgroups], T]) -> T:
    """Run `work` where the paths of cgroups begin at the node's root. `proc` is a procfs of the node.

    If the node's first process can't be looked at, they begin at the root of this process's cgroup namespace. Raises
    OSError, KernelRefused.
    """
    own, namespace = (proc / "self/ns/cgroup").stat().st_ino, proc / "1/ns/cgroup"
    try:
        opened = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return work(_cgroups())
    with Descriptor(opened) as entered:
        if os.fstat(entered.fd).st_ino == own:
            return work(_cgroups())

        def inside() -> T:
            if _LIBC.setns(entered.fd, _CLONE_NEWCGROUP) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(namespace))
            return work(_cgroups())

        return _in_own_thread(inside)


def _in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends afterwards, and return its result or raise its exception."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="cgroups")
    thread.start()
    thread.join()
    return outcome.result()


def _cgroups() -> Cgroups:
    mounted = cgroup2_root()
    shown = [mount.shows for mount in mounts("cgroup2") if mount.path == mounted]
    return Cgroups(mounted, shown[-1])  # of mounts on the same path the last counts


def _read(path: Path) -> bytes:
    """The same as read_bytes(), in a third of its time: a look at the node reads this file for most processes."""
    with Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as opened:
        return b"".join(iter(lambda: os.read(opened.fd, 65536), b""))
