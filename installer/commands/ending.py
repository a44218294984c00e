"""How a command ends: its exit status and its last message. Nothing a user does ends in a traceback.

click's own error handling prints several lines. It knows neither our errors nor which pipe is broken.
"""

import errno
import os
import platform
import select
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click
from click.exceptions import Abort, Exit, NoArgsIsHelpError

from bpf.errors import SidestepError
from installer import VERSION
from installer.commands.crash_files import CrashFiles

# docs/cli.md explains them
GOOD, FAILED, USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OURS = ("bpf", "cni", "installer")
_DEBUG = "SIDESTEP_DEBUG"


def run_command(command: Callable[[], int], crashes: CrashFiles | None = None) -> int:
    """Run a command and return its exit status. If it raises or is interrupted, print its last message."""
    crashes = crashes or CrashFiles()
    _fill_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = sys.unraisablehook = _hook(crashes)
    try:
        return _flushed(_status(command, crashes))
    except KeyboardInterrupt:  # while the output waited for its reader
        _drop_output()
        return INTERRUPTED


def _fill_closed_streams() -> None:
    """Give /dev/null to each standard stream that is closed (`>&-`, some cron jobs and daemons): output goes nowhere.

    Python leaves such a stream None. Without this, the first file that a command opens takes the descriptor's number,
    and what libraries print goes to that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which usually is the stream's own
        if null != number:
            os.dup2(null, number)
            os.close(null)
        setattr(sys, name, os.fdopen(number, mode))


def _status(command: Callable[[], int], crashes: CrashFiles) -> int:
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
        return _unforeseen(error, crashes)


def _unforeseen(error: Exception, crashes: CrashFiles) -> int:
    """Report an error that has no message of its own: a fault of the machine, else a bug of sidestep."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return READER_GONE
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OURS:
        return _said(f"the Python package {error.name} is missing; `make setup` installs all that is needed", FAILED)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return _said(f"{error.filename or 'the output'}: {error.strerror}; make room, or write elsewhere", FAILED)
    return _said(last_words(error, crashes), FAILED)


def _usage(error: click.UsageError) -> str:
    """The error on one line, with the --help that explains it."""
    path = error.ctx.command_path if error.ctx else "sidestep"
    words = " ".join(error.format_message().split()).removesuffix(".")
    return f"{words}{'' if words.endswith(('?', '?)')) else ';'} see {path} --help"


def _said(words: object, status: int) -> int:
    with suppress(BrokenPipeError):
        click.echo(f"sidestep: {words}", err=True)
    return status


def _flushed(status: int) -> int:
    """Write buffered output now, while a failure can still be reported. Returns the exit status."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return status or READER_GONE
    return status


def _drop_output() -> None:
    """Discard buffered output. Otherwise the interpreter tries to write it when it ends, and blocks or complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Whether the broken pipe is standard output, and not a connection to a peer."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _hook(crashes: CrashFiles) -> Callable[[Any], None]:
    """A hook for errors in threads, and for errors that nothing can catch, as in a C library's callback.

    It reports each type of error once, because every further call may raise the same error.
    """
    told: set[type[BaseException]] = set()

    def hook(args: Any) -> None:  # threading and sys both pass exc_type and exc_value
        if isinstance(args.exc_value, Exception) and args.exc_type not in told:
            told.add(args.exc_type)
            with suppress(Exception):  # the interpreter may be shutting down
                _said(last_words(args.exc_value, crashes), FAILED)

    return hook


def last_words(error: Exception, crashes: CrashFiles) -> str:
    """The message about an unforeseen error.

    The traceback goes to a file for the bug report. If SIDESTEP_DEBUG is set, it goes to standard error instead.
    """
    what = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
    if os.environ.get(_DEBUG, "0") not in ("", "0"):
        sys.stderr.write(_report(error))
        return f"{what}; please report it with the traceback above"
    if path := crashes.write(_report(error)):
        return f"{what}; please report it with the file {path}"
    return f"{what}; please report it with the traceback that {_DEBUG}=1 shows"


def _report(error: Exception) -> str:
    system = platform.uname()
    return (
        f"sidestep {VERSION}\n"
        f"kernel   {system.system} {system.release} {system.version} {system.machine}\n"
        f"python   {platform.python_version()}\n"
        f"command  {shlex.join(sys.argv)}\n"
        f"user     {os.geteuid()}\n\n" + "".join(traceback.format_exception(error))
    )
