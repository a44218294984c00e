"""`sidestep top` in a pseudo-terminal: what is on the screen, keys, another size, and the terminal afterwards."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyte
import pytest

from tests.lab.command import sidestep
from tests.lab.node import REPOSITORY
from tests.node.conftest import Mesh

ALTERNATE, NORMAL = b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """A terminal with `sidestep top` in it, and what it shows."""

    def __init__(self, mesh: Mesh, lines: int = 24, columns: int = 110, errors: Path | None = None) -> None:
        self.controller, terminal = pty.openpty()
        self.before = termios.tcgetattr(terminal)
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        self._size(lines, columns)
        argv = [sys.executable, "-m", "installer", "top", "--bpffs", str(mesh.node.bpffs), "--seconds", "0.3"]
        environment = os.environ | {"TERM": "xterm-256color"}
        environment.pop("COLUMNS", None)
        environment.pop("LINES", None)
        self.process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            stdin=terminal,
            stdout=terminal,
            stderr=errors.open("w") if errors else terminal,
            env=environment,
            process_group=0,
        )
        self.terminal = terminal

    def press(self, keys: bytes) -> None:
        os.write(self.controller, keys)

    def resize(self, lines: int, columns: int) -> None:
        self._size(lines, columns)
        self._screen.resize(lines, columns)
        self._screen.reset()
        self.process.send_signal(signal.SIGWINCH)

    def shows(self, *texts: str, seconds: float = 15) -> list[str]:
        """Wait until all of it is on the screen; its lines."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._read(0.1)
            if all(any(text in line for line in self._screen.display) for text in texts):
                return list(self._screen.display)
        raise AssertionError(f"{texts} never all on the screen:\n" + "\n".join(self._screen.display))

    def ends(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(10)
        self._read(0.2)
        return status

    def _read(self, seconds: float) -> None:
        while select.select([self.controller], [], [], seconds)[0]:
            data = os.read(self.controller, 65536)
            self.written += data
            self._stream.feed(data)

    def _size(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.controller, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))


@contextmanager
def shown(mesh: Mesh, lines: int = 24, columns: int = 110) -> Iterator[Terminal]:
    terminal = Terminal(mesh, lines, columns)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.controller)
        os.close(terminal.terminal)


def test_pods_and_their_rates_are_on_the_screen(mesh: Mesh) -> None:
    with shown(mesh) as terminal:
        terminal.shows("default/alpha", "default/beta", "attached", "2 pods", "sorted by captured")
        mesh.alpha.curl(mesh.beta.ip4)
        terminal.press(b"q")
        assert terminal.ends() == 0


def test_keys_sort(mesh: Mesh) -> None:
    with shown(mesh) as terminal:
        terminal.shows("sorted by captured")
        for key, name in ((b"f", "failed"), (b"a", "accelerated"), (b"n", "name"), (b"x", "name")):
            terminal.press(key)
            terminal.shows(f"sorted by {name}")


def test_another_size_is_another_screen(mesh: Mesh) -> None:
    with shown(mesh) as terminal:
        terminal.shows("default/alpha", "default/beta")
        terminal.resize(8, 90)
        lines = terminal.shows("1 more pods below", "default/alpha")
        assert not any("default/beta" in line for line in lines)
        terminal.resize(30, 160)
        terminal.shows("default/alpha", "default/beta", "q quit")


@pytest.mark.parametrize("end", [None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_as_it_was(mesh: Mesh, end: signal.Signals | None) -> None:
    with shown(mesh) as terminal:
        terminal.shows("default/alpha")
        assert termios.tcgetattr(terminal.terminal)[3] & termios.ECHO == 0
        if end is None:
            terminal.press(b"q")
        else:
            terminal.process.send_signal(end)
        assert terminal.ends() in (0, 130)
        assert termios.tcgetattr(terminal.terminal) == terminal.before
        assert terminal.written.count(ALTERNATE) == terminal.written.count(NORMAL) == 1
        assert b"Traceback" not in terminal.written


def test_a_terminal_that_goes_away_is_no_error(mesh: Mesh, tmp_path: Path) -> None:
    terminal = Terminal(mesh, errors=tmp_path / "errors")
    try:
        terminal.shows("default/alpha")
        os.close(terminal.terminal)
        os.close(terminal.controller)
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert (tmp_path / "errors").read_text() == ""


def test_without_a_terminal_it_is_one_line(mesh: Mesh) -> None:
    done = sidestep(mesh.node, "top")
    said = "sidestep: top needs a terminal; `sidestep report` and `sidestep status --output json` don't\n"
    assert (done.returncode, done.stderr) == (1, said)
