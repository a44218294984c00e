"""`sidestep trace`: reads events and prints them as they happen."""

import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from bpf.errors import SidestepError
from bpf.layout import Event
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace, deaths_told
from cni.enrolment.steered import steering_of
from cni.enrolment.strays import processes_of
from installer.commands.names import PodNames, cookie_of
from installer.commands.trace.forms import FORMS
from installer.commands.trace.told_events import Reader
from installer.commands.trace.wanted import Wanted

# the ring holds some 18,000 events: three times what 100,000 a second bring in this time
_POLL_SECONDS = 0.05
_ENDING = (signal.SIGINT, signal.SIGTERM)


def follow_events(pins: Pins, proc: Path, pod: str | None, wanted: Wanted, seconds: float | None, output: str) -> None:
    """Print events for so many seconds, None for no end. Ctrl-C and SIGTERM end it too. Raises SidestepError.

    `proc` is a procfs of the node.
    """
    with ExitStack() as running:
        interruption = running.enter_context(Interruption())
        tables = running.enter_context(Tables(pins))
        cookie = cookie_of(tables, pod) if pod else 0
        events = running.enter_context(Trace(pins, cookie))
        _tell_untraced(pins, tables, proc, cookie)
        if not wanted.verdict:
            _tell_deaths(running, pins, interruption)
        follower = _Follower(events, Reader(PodNames(tables)), wanted, output)
        if not interruption.is_asked:
            events.poll(0)  # drops the events that came before this
            click.echo("tracing", err=True)
        until = time.monotonic() + seconds if seconds else None
        while not interruption.is_asked and (until is None or time.monotonic() < until):
            follower.look(_POLL_SECONDS)
        follower.look(0)


def _tell_untraced(pins: Pins, tables: Tables, proc: Path, cookie: int) -> None:
    """Say which of the traced pods have connections without events: nothing steers them, or they are a stray's."""
    cookies = [cookie] if cookie else [key.cookie for key in tables.pods.every_key()]
    name_of = PodNames(tables)
    for each, state in steering_of(pins, tables, cookies, proc).items():
        if state.is_open:
            click.echo(f"sidestep: {name_of(each)}: {state.words}, and is not traced", err=True)
    for each, processes in processes_of(pins, cookies, proc).items():
        if processes.is_open:
            click.echo(f"sidestep: {name_of(each)}: {processes.words}; they are not traced", err=True)


def _tell_deaths(running: ExitStack, pins: Pins, interruption: "Interruption") -> None:
    try:
        running.enter_context(deaths_told(pins))
    except SidestepError as error:
        if not interruption.is_asked:  # Ctrl-C also ended the compiler: that is no fault
            click.echo(f"sidestep: processes that are killed are not shown: {error}", err=True)


@dataclass
class _Follower:
    events: Trace
    reader: Reader
    wanted: Wanted
    output: str
    lost: int = 0

    def look(self, seconds: float) -> None:
        """Wait so many seconds, then print the events that came, and how many were lost."""
        write, events = FORMS[self.output], map(Event.from_buffer_copy, self.events.poll(seconds))
        told = [write(self.reader.read(event)) for event in events if self.wanted.takes(event)]
        if missed := self.events.lost - self.lost:
            self.lost += missed
            click.echo(f"sidestep: {missed} events lost; no connection waited for them", err=True)
            if self.output != "table":
                told.append(write({"event": "lost", "count": missed}))
        if told:
            sys.stdout.write("".join(told))
            sys.stdout.flush()


class Interruption:
    """Handles SIGINT and SIGTERM while events are read, and restores the former handlers. Main thread only.

    The first signal raises nothing, because it may arrive inside libbpf's callback, where an exception would be lost.
    The trace sees it and ends by itself. A second signal raises KeyboardInterrupt: the trace may be waiting for a
    reader of its output that no longer reads.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, as in a script's background job: that stays
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _arrived(self, _: int, __: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
