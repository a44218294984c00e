"""The one agent that writes to the pins of a bpffs: a lock that the kernel releases, and the holder's name beside it.

Two agents would undo each other's work, because each knows only the pods that it has enrolled. Their run directories
may differ, so the lock is on the directory of the pins. The name is the target of a symbolic link, as a bpffs has no
files.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from bpf.bpffs import require_bpffs
from bpf.errors import SidestepError
from bpf.pins import Pins

log = structlog.get_logger("pins")

_PAUSE = 0.1  # seconds between two attempts


class PinsHeld(SidestepError):
    """Another agent holds the pins."""


class Holder:
    """Holds the pins of one bpffs for this process, while in `with held()`."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._locked: int | None = None

    @contextmanager
    def held(self, seconds: float) -> Iterator[None]:
        """Hold the pins until the context ends; wait so many seconds for a holder that ends. Raises PinsHeld."""
        require_bpffs(self._pins.bpffs)
        deadline = time.monotonic() + seconds
        while not self._take():
            if time.monotonic() > deadline:
                raise PinsHeld(
                    f"another agent serves with the pins in {self._pins.top}: {holder_of(self._pins)}; stop it, or "
                    "give this one its own --bpffs"
                )
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            self._leave()

    def keep(self) -> None:
        """Take the lock again if somebody has removed the directory that it was on."""
        if self._locked is not None and not _is_at(self._locked, self._pins.top) and not self._take():
            log.error("pins.contested", holder=holder_of(self._pins), pins=str(self._pins.top))

    def _take(self) -> bool:
        self._pins.top.mkdir(mode=0o700, exist_ok=True)
        directory = os.open(self._pins.top, os.O_RDONLY | os.O_DIRECTORY)
        if not _lock(directory) or not _is_at(directory, self._pins.top):
            os.close(directory)
            return False
        before, self._locked = self._locked, directory
        if before is not None:
            os.close(before)
        _name(self._pins).unlink(missing_ok=True)
        _name(self._pins).symlink_to(f"{socket.gethostname()}, process {os.getpid()}")  # in a cluster, the pod's name
        return True

    def _leave(self) -> None:
        assert self._locked is not None
        if _is_at(self._locked, self._pins.top):
            _name(self._pins).unlink(missing_ok=True)
            with suppress(OSError):  # the pins are there
                self._pins.top.rmdir()
        os.close(self._locked)
        self._locked = None


def is_held(pins: Pins) -> bool:
    """Whether an agent holds the pins now."""
    try:
        directory = os.open(pins.top, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(directory)
    finally:
        os.close(directory)


def holder_of(pins: Pins) -> str:
    """Who holds the pins, or has held them last before a crash."""
    try:
        return str(_name(pins).readlink())
    except OSError:
        return "a process that has not said its name"


def _name(pins: Pins) -> Path:
    return pins.top / "holder"


def _lock(directory: int) -> bool:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(directory: int, path: Path) -> bool:
    """Whether an open directory is the one that has this path now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(directory), path.stat())
    return False
