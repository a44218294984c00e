"""A cgroup and a process of the probe's own: programs are tried on them and on nobody else.

Nothing of it survives: links go with the process that holds them, the child dies with its parent, and a cgroup that a
killed probe left is removed by the next one.
"""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bpf.errors import KernelRefused
from bpf.syscalls import Descriptor

PREFIX = "sidestep-trial-"
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000  # uapi/linux/sched.h
_PR_SET_PDEATHSIG = 1  # uapi/linux/prctl.h
_REMOVAL_SECONDS = 2.0  # until a child's cgroup is empty; the kernel takes milliseconds


@contextmanager
def scratch_cgroup(below: Path) -> Iterator[Path]:
    """A cgroup2 directory below another, removed afterwards. Raises OSError when none can be made there."""
    with _scratch(below, _remove_cgroup) as path:
        yield path


@contextmanager
def scratch_pins(bpffs: Path) -> Iterator[Path]:
    """A directory on a bpffs, removed afterwards with what was pinned there. Raises OSError when none can be made."""
    with _scratch(bpffs, shutil.rmtree) as path:
        yield path


@contextmanager
def _scratch(below: Path, remove: Callable[[Path], None]) -> Iterator[Path]:
    """A directory that is locked while in use, so that another probe knows it from what a dead one has left."""
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
            os.close(fd)  # before it was locked, another probe took it for a leftover


def _clear_leftovers(below: Path, remove: Callable[[Path], None]) -> None:
    for path in below.glob(f"{PREFIX}*"):
        with suppress(OSError), Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            fcntl.flock(directory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)


def _remove_cgroup(path: Path) -> None:
    """Retries while the last process is leaving."""
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        try:
            return path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def join_cgroup(cgroup: Path) -> None:
    """Move the calling process into a cgroup. Raises OSError."""
    with Descriptor(os.open(cgroup / "cgroup.procs", os.O_WRONLY)) as procs:
        os.write(procs.fd, b"0")


def own_netns() -> None:
    """Give the calling process a network namespace of its own. Raises KernelRefused."""
    if _LIBC.unshare(_CLONE_NEWNET) != 0:
        raise KernelRefused(f"unshare(CLONE_NEWNET): {os.strerror(ctypes.get_errno())}; give CAP_SYS_ADMIN")


def in_child(work: Callable[[], Any], seconds: float) -> Any:
    """Run `work` in a forked process and return what it returned, through JSON.

    The child dies with this process, and is killed when it takes longer. Raises KernelRefused with the child's own
    error, or saying that it gave none. `work` must do little: it runs after a fork without exec.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(work, parent, writing)
    os.close(writing)
    with Descriptor(reading):
        try:
            said = _read_all(reading, time.monotonic() + seconds)
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not said:
        raise KernelRefused(f"the trial process ended without a word, or took more than {seconds:g} s; probe again")
    answer = json.loads(said)
    if "error" in answer:
        raise KernelRefused(answer["error"])
    return answer["result"]


def _run_child(work: Callable[[], Any], parent: int, writing: int) -> None:
    """Does not return: nothing of the parent's clean-up may run here."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        try:
            answer = {"result": work()}
        except Exception as error:  # whatever it is, the parent has to tell it
            answer = {"error": str(error) or type(error).__name__}
        os.write(writing, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _read_all(fd: int, deadline: float) -> bytes:
    said = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        part = os.read(fd, 65536)
        if not part:
            return said
        said += part
    return b""
