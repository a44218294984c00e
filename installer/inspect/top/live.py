"""The loop of `sidestep top`: a sample a second, keys in between, and the terminal as it was at the end."""

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live

from bpf.errors import SidestepError
from bpf.pins import Pins
from bpf.tables import Tables
from installer.inspect.sampling.sample import rates_between, take_sample
from installer.inspect.top.screen import ORDERS, screen


class NoTerminal(SidestepError):
    """It is shown on a terminal or not at all."""


def top(pins: Pins, seconds: float) -> None:
    """Show the node until q or Ctrl-C. Raises NoTerminal, NotAttached."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise NoTerminal("top needs a terminal; `sidestep report` and `sidestep status --output json` don't")
    console = Console()
    order = ORDERS[0]
    with Tables(pins.look_only()) as tables, _keys() as keys, suppress(KeyboardInterrupt):
        before = take_sample(pins, tables)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            pause = 0.2  # the first figures come soon
            while True:
                key = keys(pause)
                if key == "q":
                    return
                chosen = next((each for each in ORDERS if each.key == key), None)
                order = chosen or order
                after = take_sample(pins, tables)
                live.update(screen(after, rates_between(before, after), order, console.size.height), refresh=True)
                # what a key or a new size shows again is of the same time, and not of the moment since
                if key is None:
                    before, pause = after, seconds


@contextmanager
def _keys() -> "Iterator[_Keys]":
    """Keys as they are pressed, without echo; the terminal's settings come back."""
    descriptor = sys.stdin.fileno()
    settings = termios.tcgetattr(descriptor)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    former = signal.signal(signal.SIGWINCH, lambda *_: None)
    former_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    tty.setcbreak(descriptor)
    try:
        yield _Keys(descriptor, reader)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)
        signal.set_wakeup_fd(former_wakeup)
        signal.signal(signal.SIGWINCH, former)
        os.close(reader)
        os.close(writer)


class _Keys:
    """Waits for a key or for the window's new size."""

    def __init__(self, terminal: int, resized: int) -> None:
        self._terminal, self._resized = terminal, resized

    def __call__(self, seconds: float) -> str | None:
        """The key, empty when the window has another size, None when the time is up."""
        ready, _, _ = select.select([self._terminal, self._resized], [], [], seconds)
        if self._resized in ready:
            with suppress(BlockingIOError):
                os.read(self._resized, 64)
        if self._terminal in ready:
            return os.read(self._terminal, 1).decode(errors="replace") or "q"
        return "" if ready else None
