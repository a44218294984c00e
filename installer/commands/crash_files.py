"""The files with tracebacks of internal errors: where they are written, and where `sidestep bugreport` finds them."""

import os
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from installer.settings import Node, default_of

_KEPT = 10  # files: an agent that crashes at every start must not fill the directory
_VARIABLE = "CNI_AGENT_RUN_DIR"


def crash_files(run_dir: Path) -> list[Path]:
    """Those in a run directory, the oldest first."""
    return sorted(run_dir.glob("crash-*.txt"))


class CrashFiles:
    """Where this process writes one: the run directory of its settings.

    `run_dir` is that of the command's option. An error may come before the options are read, and some commands have no
    such option: then it is None, and environment and default decide.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir

    def write(self, report: str) -> str:
        """Write a file that only we can read, in the run directory or else in TMPDIR. Returns its path, "" on failure.

        The run directory keeps the last ten.
        """
        for directory in (self.run_dir or _of_environment(), None):
            with suppress(OSError):
                for old in crash_files(directory)[: 1 - _KEPT] if directory else ():
                    old.unlink()
                fd, path = tempfile.mkstemp(".txt", f"crash-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-", directory)
                with os.fdopen(fd, "w", errors="backslashreplace") as file:
                    file.write(report)
                return path
        return ""


def _of_environment() -> Path | None:
    """The run directory without the option. The default is not known if /proc can't be read: then None."""
    if given := os.environ.get(_VARIABLE):
        return Path(given)
    with suppress(OSError):
        return Path(default_of(Node, "cni_agent_run_dir"))
    return None
