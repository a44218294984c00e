"""Taking cgroups away as kubelet does."""

import errno
from pathlib import Path

from tests.lab.waiting import wait_until


def remove_cgroup(cgroup: Path, seconds: float = 10) -> None:
    """Remove a cgroup and those below it; nothing if there is none.

    A process counts until it is reaped, and a runtime may still take away what it has made: both are waited for. Raises
    TimeoutError.
    """
    wait_until(lambda: _is_gone(cgroup), f"the cgroup {cgroup} to be empty", seconds)


def _is_gone(cgroup: Path) -> bool:
    try:
        for each in sorted(cgroup.glob("**/"), reverse=True):
            each.rmdir()
    except FileNotFoundError:  # a runtime was faster
        return not cgroup.exists()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
