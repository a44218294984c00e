"""`python -m tests.lab.forking`: a process that has imported all of sidestep, and forks for each command asked for.

A command's imports take most of its time, and tests run hundreds of commands. Each command is a process all the same,
with its own output, signals and exit status. How a command starts, tests/agent/test_cli_endings.py looks at.
"""

import gc
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from atexit import register
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

REPOSITORY = Path(__file__).parents[2]
_STDIN = 0  # where the server is asked
_LONGEST = 1 << 16  # bytes of a command line and its environment
_WORD = 16  # bytes: a process id, or an exit status


def run(argv: Sequence[str], environment: Mapping[str, str], seconds: float) -> "subprocess.CompletedProcess[str]":
    """A command to its end. Raises TimeoutExpired, after killing it."""
    told, tells = os.pipe()
    with TemporaryFile() as output, TemporaryFile() as errors, os.fdopen(told, "rb", buffering=0) as status:
        request = json.dumps([argv, dict(environment)]).encode()
        assert len(request) < _LONGEST
        socket.send_fds(_server(), [request], [output.fileno(), errors.fileno(), tells])
        os.close(tells)
        pid = int(status.read(_WORD))
        if not _has_ended(pid, seconds):
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(argv), seconds)
        os.set_blocking(told, False)  # a child that outlives the command has it too
        ended = int(status.read(_WORD) or -signal.SIGKILL)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(list(argv), ended, output.read().decode(), errors.read().decode())


def _has_ended(pid: int, seconds: float) -> bool:
    """Whether somebody else's child ends in time."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)


@cache
def _server() -> socket.socket:
    """Starts it. It ends with this process, whose end of the socket closes then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen([sys.executable, "-m", "tests.lab.forking"], cwd=REPOSITORY, stdin=theirs.fileno())
    register(server.wait)
    register(ours.close)
    return ours


def _import_everything() -> None:
    import installer

    for module in pkgutil.walk_packages(installer.__path__, "installer."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    gc.collect()
    gc.freeze()  # or the first collection of each child copies every page


def _become_a_command() -> int:
    """Serve; returns in a child that is to be a command, with the descriptor on which it tells how it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a command here
    with socket.socket(fileno=os.dup(_STDIN)) as asked:
        while True:
            request, descriptors, _, _ = socket.recv_fds(asked, _LONGEST, 3)
            if not request:
                sys.exit()
            if os.fork() == 0:
                break
            for descriptor in descriptors:
                os.close(descriptor)
    output, errors, tells = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), _STDIN)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.set_inheritable(tells, False)
    os.write(tells, _word(os.getpid()))
    arguments, environment = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["sidestep", *arguments]
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    return tells


def _word(number: int) -> bytes:
    return str(number).ljust(_WORD).encode()


def _end(status: int, tells: int) -> NoReturn:
    """As an interpreter ends, but for taking down every module, which would copy all that is shared with the server."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    os.write(tells, _word(status))
    os._exit(status)


if __name__ == "__main__":
    _import_everything()
    tells = _become_a_command()
    from installer.commands.cli import main

    try:
        main()
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        _end(ended.code, tells)
