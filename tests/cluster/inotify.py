"""The machine's limit of inotify instances, raised while clusters run.

An Envoy takes one and pilot-agent two, and all sidecars have the same user, to whom Linux gives 128 in the whole
machine. The limit belongs to no namespace, so the machine's own is raised, and whoever takes the last cluster down
puts it back.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYSCTL = Path("/proc/sys/fs/inotify/max_user_instances")
_ENOUGH = 1024
_FOLDER = Path("/run/sidestep-test-inotify")  # of the machine, because clusters of other checkouts count
_BEFORE = _FOLDER / "before"
_HOLDERS = _FOLDER / "clusters"


def raise_limit(cluster: str) -> None:
    """Until lower_limit() of the same cluster."""
    with _locked():
        if not _BEFORE.exists():
            _BEFORE.write_text(_SYSCTL.read_text())
        _SYSCTL.write_text(str(max(_ENOUGH, int(_BEFORE.read_text()))))
        (_HOLDERS / cluster).touch()


def lower_limit(cluster: str) -> None:
    """Put the limit back if no other cluster needs it."""
    with _locked():
        (_HOLDERS / cluster).unlink(missing_ok=True)
        if _BEFORE.exists() and not any(_HOLDERS.iterdir()):
            _SYSCTL.write_text(_BEFORE.read_text())
            _BEFORE.unlink()


@contextmanager
def _locked() -> Iterator[None]:
    _HOLDERS.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
