"""Reading what the programs tell: one reader a node, which takes events out of the ring as they come.

The programs tell nothing unless somebody's interest is fresh, so a reader that was killed costs nothing for long.
Processes that die of signals are seen by raw tracepoints, which are there for as long as somebody traces.
"""

import ctypes
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bpf import syscalls
from bpf.compiler import DEATH_HOOKS, compile_deaths
from bpf.errors import KernelRefused, SidestepError
from bpf.layout import Event, Quad, TracingEntry, Word
from bpf.libbpf import LIBBPF, TakeEvent
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Table

# how long an interest lasts, and how often it is renewed
_LEASE_SECONDS, _RENEW_SECONDS = 3.0, 1.0
_NS = 1_000_000_000
_EVENT_BYTES = ctypes.sizeof(Event)
# taken at once: who is slower than the programs are must come to its senses, and lose events rather than memory
_BATCH = 20_000
_ENOUGH = -1  # ends a consume early; the event that it is said of is taken all the same


class TraceBusy(SidestepError):
    """Somebody reads events already."""


class Trace:
    """Use as a context manager: events flow while it is open.

    `cookie` is the netns cookie of the one pod of interest, 0 for all. Raises NotAttached, KernelRefused, TraceBusy.
    """

    def __init__(self, pins: Pins, cookie: int = 0) -> None:
        self._cookie = cookie
        self._taken: list[bytes] = []
        with ExitStack() as opening:
            self._tracing: Table[Word, TracingEntry] = Table(pins, "tracing")
            opening.callback(os.close, self._tracing.descriptor)
            self._losses: Table[Word, Quad] = Table(pins, "lost")
            opening.callback(os.close, self._losses.descriptor)
            opening.callback(os.close, _lock(pins))
            self._callback = TakeEvent(self._hand_over)
            with Descriptor(syscalls.open_pin(pins.maps / "events")) as events:
                self._ring = LIBBPF.ring_buffer__new(events.fd, self._callback, None, None)
            if not self._ring:
                raise syscalls.refused("ring_buffer__new", pins.maps / "events", ctypes.get_errno())
            opening.callback(LIBBPF.ring_buffer__free, self._ring)
            self._lost_before = self._count_lost()
            self._consume()  # what an earlier reader has left is nobody's business
            self._write(_until())
            self._open = opening.pop_all()
        self._closing = threading.Event()
        # of its own: while whoever reads our output is slow, events are lost and counted, rather than not made
        self._renewing = threading.Thread(target=self._renew, name="trace", daemon=True)
        self._renewing.start()

    def poll(self, seconds: float) -> list[bytes]:
        """Wait so long, then return what there is: the bytes of each event (layout.Event). Call it often.

        Nobody is woken for an event: that would cost those who make connections, and more than telling of them.
        """
        time.sleep(seconds)
        return self._consume()

    @property
    def lost(self) -> int:
        """Events for which there was no room since it was opened."""
        return self._count_lost() - self._lost_before

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            self._closing.set()
            self._renewing.join()
            self._write(0)

    def _consume(self) -> list[bytes]:
        LIBBPF.ring_buffer__consume(self._ring)
        taken, self._taken = self._taken, []
        return taken

    def _hand_over(self, _: int, data: int, __: int) -> int:
        """Nothing that can fail: what is raised here goes nowhere, and a signal's handler may run here."""
        self._taken.append(ctypes.string_at(data, _EVENT_BYTES))
        return 0 if len(self._taken) < _BATCH else _ENOUGH

    def _renew(self) -> None:
        while not self._closing.wait(_RENEW_SECONDS):
            with suppress(KernelRefused):  # nobody hears of it here; the next time may do, or the interest runs out
                self._write(_until())

    def _count_lost(self) -> int:
        return int((self._losses.get(Word(0)) or Quad()).quad)

    def _write(self, until: int) -> None:
        self._tracing.put(Word(0), TracingEntry(until, self._cookie))


def _until() -> int:
    """The end of an interest that begins now, ns on the clock of the programs."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(_LEASE_SECONDS * _NS)


def _lock(pins: Pins) -> int:
    """Hold the ring for this process. Raises TraceBusy."""
    descriptor = os.open(pins.maps, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise TraceBusy("somebody else traces on this node; end that `sidestep trace` first") from None
    return descriptor


@contextmanager
def deaths_told(pins: Pins) -> Iterator[None]:
    """Meanwhile there are events of them too. Raises CompileFailed or KernelRefused where the kernel can't."""
    with ExitStack() as open_:
        with tempfile.TemporaryDirectory(prefix="trace-", dir=pins.top) as scratch:
            compile_deaths(pins.maps, Path(scratch))
            for hook, tracepoint in DEATH_HOOKS.items():
                path = Path(scratch) / hook.name
                with Descriptor(syscalls.open_pin(path)) as program:
                    open_.callback(os.close, syscalls.open_raw_tracepoint(tracepoint, program.fd))
                path.unlink()
        yield
