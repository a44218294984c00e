"""What tests do to the whole machine, so that those that run at the same time must not notice: kept apart by locks.

Tests of another checkout run on the same machine, so the locks are the machine's. Their empty files stay until a
reboot.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCKS = Path("/run")


@contextmanager
def acceleration_needed() -> Iterator[None]:
    """Nobody takes acceleration from this machine meanwhile; any number of tests may rely on it."""
    with _locked("acceleration", fcntl.LOCK_SH):
        yield


@contextmanager
def memory_for_one() -> Iterator[None]:
    """This test alone fills TCP's memory: with it short, nothing is redirected on any node of this machine."""
    with _locked("acceleration", fcntl.LOCK_EX):
        yield


@contextmanager
def other_owner_for_all() -> Iterator[None]:
    """This test alone owns sockets beside sidestep: every agent of this machine turns acceleration off."""
    with _locked("acceleration", fcntl.LOCK_EX):
        yield


@contextmanager
def statistics_for_one() -> Iterator[None]:
    """This test alone turns the counting of programs' runs on and off (kernel.bpf_stats_enabled)."""
    with _locked("statistics", fcntl.LOCK_EX):
        yield


@contextmanager
def naming_labs() -> Iterator[None]:
    """Nobody else makes or removes a lab's directory meanwhile."""
    with _locked("names", fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(what: str, how: int) -> Iterator[None]:
    with (_LOCKS / f"sidestep-lab-{what}.lock").open("w") as lock:
        fcntl.flock(lock, how)
        yield
