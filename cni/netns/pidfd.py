"""Copies sockets of other processes, because only a process that holds a socket can ask the kernel all about it."""

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bpf.syscalls import Descriptor
from cni.netns.processes import GONE

_PIDFD_GETFD = 438  # asm-generic/unistd.h, Linux 5.6; the same on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)


def sockets_of(proc: Path, pid: int) -> Iterator[tuple[int, int]]:
    """The descriptor number and the inode of each socket that a process has. `proc` is a procfs of the node."""
    with suppress(*GONE):
        for each in (proc / str(pid) / "fd").iterdir():
            with suppress(*GONE):
                target = str(each.readlink())
                if target.startswith("socket:["):
                    yield int(each.name), int(target[8:-1])


def sees_nodes_pids(proc: Path) -> bool:
    """Whether the process ids in `proc`, a procfs of the node, are those that this process uses.

    `self/stat` begins with the reader's id in the pid namespace of the procfs. Raises OSError if it is not there.
    """
    return int((proc / "self/stat").read_text().partition(" ")[0]) == os.getpid()


def copy_of(pid: int, number: int, inode: int) -> socket.socket:
    """Copy the socket that process `pid` has as descriptor `number`. The caller closes the copy.

    `inode` is the socket's: if the descriptor is something else by now, this raises ProcessLookupError. Raises other
    OSErrors as well. Needs CAP_SYS_PTRACE and the node's pid namespace.
    """
    with Descriptor(os.pidfd_open(pid)) as process:
        got = int(_LIBC.syscall(_PIDFD_GETFD, process.fd, number, 0))
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if os.fstat(got).st_ino != inode:
        os.close(got)
        raise ProcessLookupError
    return socket.socket(fileno=got)
