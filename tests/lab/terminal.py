"""Runs a command of this source tree in a terminal of its own, as wide as asked for."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress

from tests.lab.node import REPOSITORY

_SECONDS = 60


def screen_of(*argv: object, columns: int = 80) -> list[str]:
    """The lines that the command writes there until it ends."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    settings = termios.tcgetattr(terminal)
    settings[1] &= ~termios.OPOST  # line feeds stay as they are
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    environment = os.environ | {"TERM": "dumb"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "installer", *map(str, argv)],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    written = b""
    with suppress(OSError):  # EIO, once nobody has the other end any more
        while part := os.read(controller, 65536):
            written += part
    os.close(controller)
    process.wait(_SECONDS)
    return written.decode().splitlines()
