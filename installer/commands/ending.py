"""How a command ends: its exit status and its last words. Nothing a user does ends in a traceback."""

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click
from click.exceptions import Abort, Exit, NoArgsIsHelpError

from bpf.errors import SidestepError
from installer.commands import crash

GOOD, FAILED, USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

# the manual shows these
STATUSES = (
    (GOOD, "It is done; `sidestep probe`: capture will work on this node."),
    (
        FAILED,
        "It could not be done: one line on standard error says why and what to do. `sidestep probe`: capture will not "
        "work, its table says what is missing. `sidestep explain`: with `--try`, the kernel did something else. "
        "`sidestep status`: the programs are not attached. `sidestep deny`: with `--kill`, some connections stay.",
    ),
    (USAGE, "The command line is wrong, or a setting in the environment is: one line says which."),
    (INTERRUPTED, "Interrupted with Ctrl-C. (The agent and `sidestep trace` end in an orderly way then: 0.)"),
    (READER_GONE, "Whoever read the output has gone, as in `sidestep … | head`; nothing is said."),
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OURS = ("bpf", "cni", "installer")


def run_command(command: Callable[[], int]) -> int:
    """The exit status of a command that returns its own, raises, or is interrupted; its last words are said."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = _thread_crashed
    sys.unraisablehook = _hook_of_unraisable()
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
        return ended.code if isinstance(ended.code, int) else _said(ended.code, FAILED) if ended.code else GOOD
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
    return _said(crash.last_words(error), FAILED)


def _usage(error: click.UsageError) -> str:
    """One line, with where to read on."""
    path = error.ctx.command_path if error.ctx else "sidestep"
    words = " ".join(error.format_message().split()).removesuffix(".")
    return f"{words}{'' if words.endswith(('?', '?)')) else ';'} see {path} --help"


def _said(words: object, status: int) -> int:
    with _until_reader_is_gone():
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


@contextmanager
def _until_reader_is_gone() -> Iterator[None]:
    with suppress(BrokenPipeError):
        yield


def _reader_is_gone() -> bool:
    """Whether a broken pipe is the one that the output goes to, and not that of some peer."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _thread_crashed(args: threading.ExceptHookArgs) -> None:
    if isinstance(args.exc_value, Exception):
        _said(crash.last_words(args.exc_value), FAILED)


def _hook_of_unraisable() -> Callable[["sys.UnraisableHookArgs"], None]:
    """For what is raised where nobody can catch it, as in a callback of a C library; told once, it may be each time."""
    seen: set[type[BaseException]] = set()

    def hook(args: "sys.UnraisableHookArgs") -> None:
        if not isinstance(args.exc_value, Exception) or args.exc_type in seen:
            return
        seen.add(args.exc_type)
        with suppress(Exception):  # the interpreter may be coming to its end
            _said(crash.last_words(args.exc_value), FAILED)

    return hook
