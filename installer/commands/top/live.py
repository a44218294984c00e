"""The loop of `sidestep top`: takes samples, reads keys in between, and restores the terminal at the end."""

import errno
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from bpf.errors import SidestepError
from bpf.pinned import Pinned, pinned_now
from bpf.pins import Pins
from bpf.tables import Tables
from installer.commands.sampling.sample import rates_between, take_sample
from installer.commands.top.screen import ORDERS, screen


class NoTerminal(SidestepError):
    """`sidestep top` has no terminal to draw on."""


def show_top(pins: Pins, seconds: float, proc: Path) -> None:
    """Show the node until q, Ctrl-C, SIGTERM or SIGHUP.

    If the programs are detached and attached again, it goes on with the new maps. Raises NoTerminal, NotAttached;
    OtherVersion if another version takes the pods over.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise NoTerminal("top needs a terminal; `sidestep report` and `sidestep status --output json` don't")
    console = Console()
    order = ORDERS[0]
    with _Maps(pins) as maps, _until_hung_up(), _keys() as keys, suppress(KeyboardInterrupt):
        before = take_sample(pins, maps.tables, proc)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            pause = 0.2  # the first figures come soon
            while True:
                key = keys(pause)
                if key == "q":
                    return
                chosen = next((each for each in ORDERS if each.key == key), None)
                order = chosen or order
                if maps.follow():
                    before = take_sample(pins, maps.tables, proc)
                after = take_sample(pins, maps.tables, proc)
                live.update(
                    screen(after, rates_between(before, after), order, console.size.height, console.size.width),
                    refresh=True,
                )
                # a key or a new window size draws early, but starts no new interval for the rates
                if key is None:
                    before, pause = after, seconds


class _Maps:
    """The maps of the programs that are attached, or were last."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins.look_only()
        self.tables = Tables(self._pins)

    def follow(self) -> bool:
        """Open the maps that are pinned now, if they are others; returns whether they are. Raises OtherVersion."""
        if pinned_now(self._pins, self.tables.pods) is not Pinned.ANOTHER:
            return False
        fresh = Tables(self._pins)
        self.tables.close()
        self.tables = fresh
        return True

    def __enter__(self) -> "_Maps":
        return self

    def __exit__(self, *_: object) -> None:
        self.tables.close()


@contextmanager
def _until_hung_up() -> Iterator[None]:
    """End without a message if the terminal has gone (EIO): nobody could read it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


@contextmanager
def _keys() -> "Iterator[_Keys]":
    """Read keys as they are pressed, without echo. The terminal's settings come back, also after SIGTERM or SIGHUP."""
    descriptor = sys.stdin.fileno()
    settings = termios.tcgetattr(descriptor)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    keys = _Keys(descriptor, reader)
    handlers = {signal.SIGWINCH: lambda *_: None, signal.SIGTERM: keys.end, signal.SIGHUP: keys.end}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    former_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    tty.setcbreak(descriptor)
    try:
        yield keys
    finally:
        with suppress(termios.error):  # the terminal may have gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)
        signal.set_wakeup_fd(former_wakeup)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


class _Keys:
    """Waits for a key, a new window size, or a signal to end."""

    def __init__(self, terminal: int, signalled: int) -> None:
        self._terminal, self._signalled = terminal, signalled
        self._is_over = False

    def end(self, *_: object) -> None:
        """A signal's handler: from now on the key is always q."""
        self._is_over = True

    def __call__(self, seconds: float) -> str | None:
        """The key; "" if the window has a new size; None if the time is up."""
        ready, _, _ = select.select([self._terminal, self._signalled], [], [], seconds)
        if self._signalled in ready:
            with suppress(BlockingIOError):
                os.read(self._signalled, 64)
        if self._is_over:
            return "q"
        if self._terminal in ready:
            try:
                return os.read(self._terminal, 1).decode(errors="replace") or "q"
            except OSError:  # the terminal has gone
                return "q"
        return "" if ready else None
