"""Starting processes where a pod's processes are: its network namespace, its cgroup, its user."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What pods run snippets with: the real interpreter, by a path any user can follow (a checkout may be root's alone), on
# the standard library only.
PYTHON = (str(Path(sys.executable).resolve()), "-I", "-S", "-c")

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def enter_netns(fd: int) -> None:
    """Move the calling thread into a network namespace; there is no way back."""
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def entering(netns: Path, cgroup: Path | None, uid: int, gid: int) -> Callable[[], None]:
    """What a child does between fork and exec: join the cgroup, enter the namespace, go to /, drop to the user.

    Not `ip netns exec`, which mounts /sys anew and hides cgroups and bpffs.
    """
    netns_fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    procs = str(cgroup / "cgroup.procs") if cgroup else None

    def enter() -> None:
        if procs:
            fd = os.open(procs, os.O_WRONLY)
            os.write(fd, b"0")
            os.close(fd)
        enter_netns(netns_fd)
        os.chdir("/")  # the checkout may be where the user cannot go, and some programs look where they started
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)

    enter.close = lambda: os.close(netns_fd)  # type: ignore[attr-defined]
    return enter


def popen(
    netns: Path, cgroup: Path | None, argv: Sequence[str | Path], uid: int, gid: int, **options: Any
) -> subprocess.Popen[Any]:
    """subprocess.Popen inside a pod, in a session of its own: a Ctrl-C is for whoever started the pods."""
    enter = entering(netns, cgroup, uid, gid)
    try:
        return subprocess.Popen(argv, preexec_fn=enter, start_new_session=True, **options)
    finally:
        enter.close()  # type: ignore[attr-defined]
