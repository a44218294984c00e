"""`sidestep trace`: reads events and prints them as they happen."""

import math
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import click

from bpf.errors import SidestepError
from bpf.layout import Event
from bpf.pinned import Pinned
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace, deaths_told
from cni.enrolment.steered import steering_of
from cni.enrolment.strays import processes_of
from installer.commands.names import PodNames, cookie_of
from installer.commands.trace.forms import FORMS
from installer.commands.trace.readers import Readers
from installer.commands.trace.told_events import Known, Reader
from installer.commands.trace.wanted import Wanted

# the ring holds some 18,000 events: three times what 100,000 a second bring in this time
_POLL_SECONDS = 0.05
# seconds between two looks at whether other maps are pinned, and how long to wait if there are none
_LOOK_SECONDS, _PATIENCE_SECONDS = 0.5, 30.0
# seconds for which the addresses and proxies of pods are taken to be as they were
_KNOWN_SECONDS = 1.0
_ENDING = (signal.SIGINT, signal.SIGTERM)


def follow_events(pins: Pins, proc: Path, pod: str | None, wanted: Wanted, seconds: float | None, output: str) -> None:
    """Print events for so many seconds, None for no end. Ctrl-C and SIGTERM end it too. Raises SidestepError.

    If the programs are detached and attached again, it goes on with the new maps. `proc` is a procfs of the node.
    """
    with Interruption() as interruption:
        tracing = _Tracing(pins, proc, wanted, output, seconds, interruption, Readers())
        if pod:
            with Tables(pins) as tables:
                tracing.cookie = cookie_of(tables, pod)
        try:
            while tracing.trace():
                click.echo("sidestep: the programs were attached anew, and the trace goes on", err=True)
        finally:
            tracing.close()


@dataclass
class _Tracing:
    """One run of the command: a trace, and further ones if other maps take the place of those that it reads."""

    pins: Pins
    proc: Path
    wanted: Wanted
    output: str
    seconds: float | None
    interruption: "Interruption"
    readers: Readers
    cookie: int = 0
    _until: float | None = None  # monotonic clock; set when the first trace begins
    _look_again: float = 0.0
    _nothing_since: float | None = None
    _followers: "list[_Follower]" = field(default_factory=list)

    def trace(self) -> bool:
        """Trace until the end, or until other maps are pinned; returns whether they are."""
        with ExitStack() as running:
            tables = running.enter_context(Tables(self.pins))
            events = running.enter_context(Trace(self.pins, self.cookie))
            _tell_untraced(self.pins, tables, self.proc, self.cookie)
            if not self.wanted.verdict:
                _tell_deaths(running, self.pins, self.interruption)
            follower = _Follower(events, Reader(PodNames(tables)), self.wanted, self.output, tables)
            self._followers.append(follower)
            self._begin(events)
            is_replaced = False
            while not (self._is_over() or is_replaced):
                follower.look(_POLL_SECONDS)
                is_replaced = self._is_replaced(events, follower)
            follower.look(0)
            return is_replaced

    def close(self) -> None:
        """Say how many events there were. Not if nothing was traced."""
        if self._until is not None:
            told, lost = (sum(getattr(each, name) for each in self._followers) for name in ("told", "lost"))
            with suppress(OSError):  # nobody may be there any more
                click.echo(f"traced: {told} event{'s'[: told != 1]}, {lost} lost", err=True)

    def _begin(self, events: Trace) -> None:
        if self._until is not None or self.interruption.is_asked:
            return
        events.poll(0)  # drops the events that came before this
        click.echo("tracing", err=True)
        self._until = time.monotonic() + self.seconds if self.seconds else math.inf

    def _is_over(self) -> bool:
        is_asked = self._until is None or self.interruption.is_asked or time.monotonic() >= self._until
        return is_asked or self.readers.have_gone()

    def _is_replaced(self, events: Trace, follower: "_Follower") -> bool:
        """Whether other maps are pinned now. Raises OtherVersion, and NotAttached if there have been none for long."""
        now = time.monotonic()
        if now < self._look_again:
            return False
        self._look_again = now + _LOOK_SECONDS
        try:
            pinned = events.pinned_now()
        except SidestepError:
            follower.look(0)
            raise
        if pinned is not Pinned.NOTHING:
            self._nothing_since = None
        elif self._nothing_since is None:
            self._nothing_since = now
            click.echo(f"sidestep: nothing is attached; the trace waits {_PATIENCE_SECONDS:g} s for it", err=True)
        elif now - self._nothing_since > _PATIENCE_SECONDS:
            self.pins.require_attached()
        return pinned is Pinned.ANOTHER


def _tell_untraced(pins: Pins, tables: Tables, proc: Path, cookie: int) -> None:
    """Say which of the traced pods have connections without events: nothing steers them, or they are a stray's."""
    cookies = [cookie] if cookie else [key.cookie for key in tables.pods.every_key()]
    name_of = PodNames(tables)
    for each, state in steering_of(pins, tables, cookies, proc).items():
        if state.is_open:
            click.echo(f"sidestep: {name_of(each)}: {state.words}, and is not traced", err=True)
    for each, processes in processes_of(pins, cookies, proc).items():
        if processes.is_open:
            told = "they are not traced" if processes.strays else "if there are some, they are not traced"
            click.echo(f"sidestep: {name_of(each)}: {processes.words}; {told}", err=True)


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
    tables: Tables
    told: int = 0
    lost: int = 0
    _known_at: float = -math.inf  # monotonic clock

    def look(self, seconds: float) -> None:
        """Wait so many seconds, then print the events that came, and how many were lost."""
        raw = self.events.poll(seconds)
        if raw and time.monotonic() - self._known_at > _KNOWN_SECONDS:
            self.reader.known, self._known_at = Known.of(self.tables), time.monotonic()
        write, events = FORMS[self.output], map(Event.from_buffer_copy, raw)
        told = [write(self.reader.read(event)) for event in events if self.wanted.takes(event)]
        self.told += len(told)
        if missed := self.events.lost - self.lost:
            self.lost += missed
            click.echo(f"sidestep: {missed} events lost; no connection waited for them", err=True)
            if self.output not in ("table", "wide"):
                told.append(write({"event": "lost", "count": missed}))
        if told:
            click.echo("".join(told), nl=False)  # also where the locale's encoding has no arrows


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
