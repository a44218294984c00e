"""`sidestep trace`: what happens to connections, as it happens."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass

import click

from bpf.errors import SidestepError
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace, deaths_told
from installer.commands.names import PodNames, cookie_of
from installer.commands.trace.forms import Form
from installer.commands.trace.interruption import Interruption
from installer.commands.trace.told_events import Reader, event_of
from installer.commands.trace.wanted import Wanted

# the ring holds some 18,000 events: enough for 100,000 a second, three times over
_POLL_SECONDS = 0.05


def follow_events(pins: Pins, pod: str | None, wanted: Wanted, seconds: float | None, form: Form) -> None:
    """Print events until the time is up, or for ever; Ctrl-C and SIGTERM end it. Raises SidestepError."""
    with ExitStack() as running:
        interruption = running.enter_context(Interruption())
        tables = running.enter_context(Tables(pins))
        events = running.enter_context(Trace(pins, cookie_of(tables, pod) if pod else 0))
        if not wanted.verdict:
            _tell_deaths(running, pins, interruption)
        follower = _Follower(events, Reader(PodNames(tables)), wanted, form)
        if not interruption.is_asked:
            events.poll(0)  # from now on they come
            click.echo("tracing", err=True)
        until = time.monotonic() + seconds if seconds else None
        while not interruption.is_asked and (until is None or time.monotonic() < until):
            follower.look(_POLL_SECONDS)
        follower.look(0)


def _tell_deaths(running: ExitStack, pins: Pins, interruption: Interruption) -> None:
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
    form: Form
    lost: int = 0

    def look(self, seconds: float) -> None:
        """Wait so long, then print what has come, and how much was lost."""
        lines = []
        for raw in self.events.poll(seconds):
            event = event_of(raw)
            if self.wanted.takes(event):
                lines.append(self.form.event(self.reader, event))
        if missed := self.events.lost - self.lost:
            self.lost += missed
            click.echo(f"sidestep: {missed} events lost; no connection has waited for us", err=True)
            lines += [self.form.lost(missed)] if self.form.lost(missed) else []
        if lines:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
