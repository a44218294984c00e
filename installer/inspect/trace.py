"""`sidestep trace`: what happens to connections, as it happens."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import click

from bpf.deaths import deaths_told
from bpf.errors import SidestepError
from bpf.layout import Event
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace
from installer.inspect.events import Document, Reader, Wanted
from installer.inspect.names import PodNames, cookie_of

_POLL_SECONDS = 0.2


def trace(pins: Pins, pod: str | None, wanted: Wanted, seconds: float | None, write: Callable[[Document], str]) -> None:
    """Print events until the time is up, or for ever; Ctrl-C ends it. Raises SidestepError."""
    with ExitStack() as running:
        tables = running.enter_context(Tables(pins))
        reader = Reader(PodNames(tables))
        lines: list[str] = []

        def take(event: Event) -> None:
            if wanted.takes(event):
                lines.append(write(reader.read(event)))

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


def as_json(document: Document) -> str:
    """One object a line, for pipes."""
    return json.dumps(document, ensure_ascii=False)
