"""`sidestep trace`: what happens to connections, as it happens."""

import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType

import click

from bpf.errors import SidestepError
from bpf.layout import Event
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace, deaths_told
from installer.commands.names import PodNames, cookie_of
from installer.commands.trace.forms import FORMS
from installer.commands.trace.told_events import Reader
from installer.commands.trace.wanted import Wanted

# the ring holds some 18,000 events: enough for 100,000 a second, three times over
_POLL_SECONDS = 0.05
_ENDING = (signal.SIGINT, signal.SIGTERM)


def follow_events(pins: Pins, pod: str | None, wanted: Wanted, seconds: float | None, output: str) -> None:
    """Print events until the time is up, or for ever; Ctrl-C and SIGTERM end it. Raises SidestepError."""
    with ExitStack() as running:
        interruption = running.enter_context(Interruption())
        tables = running.enter_context(Tables(pins))
        events = running.enter_context(Trace(pins, cookie_of(tables, pod) if pod else 0))
        if not wanted.verdict:
            _tell_deaths(running, pins, interruption)
        follower = _Follower(events, Reader(PodNames(tables)), wanted, output)
        if not interruption.is_asked:
            events.poll(0)  # from now on they come
            click.echo("tracing", err=True)
        until = time.monotonic() + seconds if seconds else None
        while not interruption.is_asked and (until is None or time.monotonic() < until):
            follower.look(_POLL_SECONDS)
        follower.look(0)


def _tell_deaths(running: ExitStack, pins: Pins, interruption: "Interruption") -> None:
    try:
        running.enter_context(deaths_told(pins))
    except SidestepError as error:
        if not interruption.is_asked:  # a Ctrl-C ends the compiler too
            click.echo(f"sidestep: processes that are killed are not shown: {error}", err=True)


@dataclass
class _Follower:
    events: Trace
    reader: Reader
    wanted: Wanted
    output: str
    lost: int = 0

    def look(self, seconds: float) -> None:
        """Wait so long, then print what has come, and how much was lost."""
        write, events = FORMS[self.output], map(Event.from_buffer_copy, self.events.poll(seconds))
        told = [write(self.reader.read(event)) for event in events if self.wanted.takes(event)]
        if missed := self.events.lost - self.lost:
            self.lost += missed
            click.echo(f"sidestep: {missed} events lost; no connection has waited for us", err=True)
            if self.output != "table":
                told.append(write({"event": "lost", "count": missed}))
        if told:
            sys.stdout.write("".join(told))
            sys.stdout.flush()


class Interruption:
    """SIGINT and SIGTERM while events are read; the former handlers come back. Main thread only.

    A first signal raises nothing, as it may arrive in libbpf's callback, where it would be lost: the trace comes to its
    end by itself. A second one raises KeyboardInterrupt: whoever reads our output may have stopped to.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _arrived(self, _: int, __: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
