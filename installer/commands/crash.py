"""What is left of an error that nobody has foreseen: one line for the user, a file for whoever mends it."""

import os
import platform
import shlex
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from installer import VERSION

DEBUG = "SIDESTEP_DEBUG"
_RUN = Path("/run/sidestep")
_KEPT = 10  # of an agent that is started again and again


def last_words(error: Exception) -> str:
    """What the user is told; the rest is written to a file, or shown where SIDESTEP_DEBUG is set."""
    what = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        sys.stderr.write(_report(error))
        return f"{what}; please report it with what is above"
    if path := _record(_report(error)):
        return f"{what}; please report it with the file {path}"
    return f"{what}; please report it with what {DEBUG}=1 shows"


def _report(error: Exception) -> str:
    system = platform.uname()
    return (
        f"sidestep {VERSION}\n"
        f"kernel   {system.system} {system.release} {system.version} {system.machine}\n"
        f"python   {platform.python_version()}\n"
        f"command  {shlex.join(sys.argv)}\n"
        f"user     {os.geteuid()}\n\n" + "".join(traceback.format_exception(error))
    )


def _record(report: str) -> Path | None:
    """A new file that only we can read; None when there is room for it nowhere."""
    for directory in _directories():
        path = (
            directory
            / f"crash-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}-{time.monotonic_ns()}.txt"
        )
        with suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", errors="backslashreplace") as file:
                file.write(report)
            return path
    return None


def _directories() -> Iterator[Path]:
    """The run directory if it is ours alone, else where temporary files go."""
    with suppress(OSError):
        found = _RUN.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            for old in sorted(_RUN.glob("crash-*.txt"))[: 1 - _KEPT]:
                old.unlink()
            yield _RUN
    with suppress(OSError):
        yield Path(tempfile.gettempdir())
