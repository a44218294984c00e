"""How a command ends: its exit status and its last words. Nothing a user does ends in a traceback.

click's own ending takes several lines, and knows neither our errors nor whose pipe is broken.
"""

import errno
import os
import platform
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.exceptions import Abort, Exit, NoArgsIsHelpError

from bpf.errors import SidestepError
from installer import VERSION

# docs/cli.md says what they mean
GOOD, FAILED, USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OURS = ("bpf", "cni", "installer")
_DEBUG = "SIDESTEP_DEBUG"
_RUN = Path("/run/sidestep")
_KEPT = 10  # reports, of an agent that is started again and again


def run_command(command: Callable[[], int]) -> int:
    """The exit status of a command that returns its own, raises, or is interrupted; its last words are said."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = sys.unraisablehook = _hook()
    try:
        return _flushed(_status(command))
    except KeyboardInterrupt:  # while it waited for a reader
        _drop_output()
        return INTERRUPTED


def _status(command: Callable[[], int]) -> int:
    try:
        return _flushed(command())
    except Exit as ended:
        return ended.exit_code
    except SystemExit as ended:
        return _said(ended.code, FAILED) if isinstance(ended.code, str) else ended.code or GOOD
    except NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        return _said(_usage(error), USAGE)
    except click.ClickException as error:
        return _said(error.format_message(), error.exit_code)
    except SidestepError as error:
        return _said(error, FAILED)
    except (KeyboardInterrupt, Abort):
        return INTERRUPTED
    except Exception as error:
        return _unforeseen(error)


def _unforeseen(error: Exception) -> int:
    """Of what nobody has made a message the machine's shortcomings are told from ours."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return READER_GONE
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OURS:
        return _said(f"the Python package {error.name} is missing; `make setup` installs all that is needed", FAILED)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return _said(f"{error.filename or 'the output'}: {error.strerror}; make room, or write elsewhere", FAILED)
    return _said(last_words(error), FAILED)


def _usage(error: click.UsageError) -> str:
    """One line, with where to read on."""
    path = error.ctx.command_path if error.ctx else "sidestep"
    words = " ".join(error.format_message().split()).removesuffix(".")
    return f"{words}{'' if words.endswith(('?', '?)')) else ';'} see {path} --help"


def _said(words: object, status: int) -> int:
    with suppress(BrokenPipeError):
        click.echo(f"sidestep: {words}", err=True)
    return status


def _flushed(status: int) -> int:
    """What is still buffered is written now, while somebody can be told that it fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return status or READER_GONE
    return status


def _drop_output() -> None:
    """Or the interpreter tries to write it again when it ends, and waits or complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Whether a broken pipe is the one that the output goes to, and not that of some peer."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _hook() -> Callable[[Any], None]:
    """For what is raised in a thread, or where nobody can catch it, as in a callback of a C library.

    Each kind of error is told once, as it may come each time.
    """
    told: set[type[BaseException]] = set()

    def hook(args: Any) -> None:  # both kinds of hook get these two
        if isinstance(args.exc_value, Exception) and args.exc_type not in told:
            told.add(args.exc_type)
            with suppress(Exception):  # the interpreter may be coming to its end
                _said(last_words(args.exc_value), FAILED)

    return hook


def last_words(error: Exception) -> str:
    """What the user is told of an error that nobody has foreseen.

    The rest is in a file for whoever mends it, or shown where SIDESTEP_DEBUG is set.
    """
    what = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
    if os.environ.get(_DEBUG, "0") not in ("", "0"):
        sys.stderr.write(_report(error))
        return f"{what}; please report it with what is above"
    if path := _record(_report(error)):
        return f"{what}; please report it with the file {path}"
    return f"{what}; please report it with what {_DEBUG}=1 shows"


def _report(error: Exception) -> str:
    system = platform.uname()
    return (
        f"sidestep {VERSION}\n"
        f"kernel   {system.system} {system.release} {system.version} {system.machine}\n"
        f"python   {platform.python_version()}\n"
        f"command  {shlex.join(sys.argv)}\n"
        f"user     {os.geteuid()}\n\n" + "".join(traceback.format_exception(error))
    )


def _record(report: str) -> str:
    """A new file that only we can read, in the run directory or with other temporary files; "" for no room there."""
    with suppress(OSError):
        for old in sorted(_RUN.glob("crash-*.txt"))[: 1 - _KEPT]:
            old.unlink()
    for directory in (_RUN, None):
        with suppress(OSError):
            fd, path = tempfile.mkstemp(".txt", f"crash-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-", directory)
            with os.fdopen(fd, "w", errors="backslashreplace") as file:
                file.write(report)
            return path
    return ""
