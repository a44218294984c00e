"""`sidestep trace`: what happens to connections, as it happens."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import click

from bpf.deaths import deaths_told
from bpf.errors import SidestepError
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace
from installer.inspect.names import PodNames, cookie_of
from installer.inspect.trace.events import Reader, Told, Wanted, line_of, told

# the ring holds some 18,000 events: enough for 100,000 a second, three times over
_POLL_SECONDS = 0.05


def trace(
    pins: Pins, pod: str | None, wanted: Wanted, seconds: float | None, write: Callable[[Reader, Told], str]
) -> None:
    """Print events until the time is up, or for ever; Ctrl-C ends it. Raises SidestepError."""
    with ExitStack() as running:
        tables = running.enter_context(Tables(pins))
        reader = Reader(PodNames(tables))
        lines: list[str] = []

        def take(raw: bytes) -> None:
            event = told(raw)
            if wanted.takes(event):
                lines.append(write(reader, event))

        events = running.enter_context(Trace(pins, take, cookie_of(tables, pod) if pod else 0))
        if not wanted.verdict:
            _tell_deaths(running, pins)
        with suppress(KeyboardInterrupt):
            events.poll(0)
            click.echo("tracing", err=True)
            _follow(events, lines, time.monotonic() + seconds if seconds else None)


def _tell_deaths(running: ExitStack, pins: Pins) -> None:
    try:
        running.enter_context(deaths_told(pins))
    except SidestepError as error:
        click.echo(f"sidestep: processes that are killed are not shown: {error}", err=True)


def _follow(events: Trace, lines: list[str], until: float | None) -> None:
    lost = 0
    while until is None or time.monotonic() < until:
        events.poll(_POLL_SECONDS)
        if lines:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
            lines.clear()
        if events.lost > lost:
            click.echo(f"sidestep: {events.lost - lost} events lost; no connection has waited for us", err=True)
            lost = events.lost


def as_json(reader: Reader, event: Told) -> str:
    """One object a line, for pipes."""
    return reader.json(event)


def as_line(reader: Reader, event: Told) -> str:
    """For people."""
    return line_of(reader.read(event))
