"""What tests do to the whole machine, so that those that run at the same time must not notice: kept apart by locks."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = Path(__file__).parents[2] / "build" / ".acceleration.lock"


@contextmanager
def acceleration_needed() -> Iterator[None]:
    """Nobody takes acceleration from this machine meanwhile; any number of tests may rely on it."""
    with _locked(fcntl.LOCK_SH):
        yield


@contextmanager
def memory_for_one() -> Iterator[None]:
    """This test alone fills TCP's memory: with it short, nothing is redirected on any node of this machine."""
    with _locked(fcntl.LOCK_EX):
        yield


@contextmanager
def other_owner_for_all() -> Iterator[None]:
    """This test alone owns sockets beside sidestep: every agent of this machine turns acceleration off."""
    with _locked(fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(how: int) -> Iterator[None]:
    _LOCK.parent.mkdir(exist_ok=True)
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, how)
        yield
