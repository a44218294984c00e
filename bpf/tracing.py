"""Reads the programs' events from the ring. A node has one reader at a time.

The programs emit events only while the reader's interest is fresh, so a killed reader costs nothing for long. Raw
tracepoints report processes that die of signals; they exist only while somebody traces.
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
from bpf.errors import KernelRefused, SidestepError
from bpf.hooks import DEATH_HOOKS
from bpf.layout import Event, Quad, TracingEntry, Word
from bpf.libbpf import LIBBPF, TakeEvent
from bpf.loading import load_deaths
from bpf.pinned import Pinned, pinned_now
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Table

# how long an interest lasts, and the pause between renewals
_LEASE_SECONDS, _RENEW_SECONDS = 3.0, 1.0
_NS = 1_000_000_000
_EVENT_BYTES = ctypes.sizeof(Event)
# the most events that one poll() takes. A reader that is slower than the programs must lose events, not fill its memory
_BATCH = 20_000
_ENOUGH = -1  # result of the callback that ends a consume early; the event it was called for is taken all the same


class TraceBusy(SidestepError):
    """Another process reads events on this node already."""


class Trace:
    """The node's reader of events, a context manager. The programs emit events while it is open.

    `cookie` is the netns cookie of the pod whose events are wanted, 0 for all pods. Raises NotAttached, KernelRefused,
    TraceBusy.
    """

    def __init__(self, pins: Pins, cookie: int = 0) -> None:
        self._pins, self._cookie = pins, cookie
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
            self._consume()  # drop the events that an earlier reader has left
            self._write(_until())
            self._open = opening.pop_all()
        self._closing = threading.Event()
        # A thread of its own renews the interest. So if the reader of our output is slow, events are lost and counted.
        # Otherwise the interest would run out and events would be missing without a count.
        self._renewing = threading.Thread(target=self._renew, name="trace", daemon=True)
        self._renewing.start()

    def poll(self, seconds: float) -> list[bytes]:
        """Sleep for `seconds`, then return the events that are there: the bytes of a layout.Event each. Call it often.

        The programs do not wake the reader: a wake-up would slow down the process that makes the connection, by more
        than the event itself does.
        """
        time.sleep(seconds)
        return self._consume()

    def pinned_now(self) -> Pinned:
        """What is pinned now instead of the maps that the events come from. Raises OtherVersion, KernelRefused."""
        return pinned_now(self._pins, self._tracing)

    @property
    def lost(self) -> int:
        """The number of events that did not fit into the ring since this reader was opened."""
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
        """Keep one event. libbpf calls this; the result says whether it is to go on.

        Nothing here may fail, because an exception in a callback is lost. A signal's handler may run here.
        """
        self._taken.append(ctypes.string_at(data, _EVENT_BYTES))
        return 0 if len(self._taken) < _BATCH else _ENOUGH

    def _renew(self) -> None:
        while not self._closing.wait(_RENEW_SECONDS):
            with suppress(KernelRefused):  # a thread has nobody to tell; the next renewal may work
                self._write(_until())

    def _count_lost(self) -> int:
        return int((self._losses.get(Word(0)) or Quad()).quad)

    def _write(self, until: int) -> None:
        self._tracing.put(Word(0), TracingEntry(until, self._cookie))


def _until() -> int:
    """When an interest that begins now ends: ns of CLOCK_MONOTONIC, the programs' clock."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(_LEASE_SECONDS * _NS)


def _lock(pins: Pins) -> int:
    """Lock the ring for this process; returns the descriptor that holds the lock. Raises TraceBusy."""
    descriptor = os.open(pins.maps, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        first = _reader_of(descriptor)
        os.close(descriptor)
        raise TraceBusy(
            f"{first} reads this node's events, and there can be one reader at a time; end it first"
        ) from None
    return descriptor


def _reader_of(descriptor: int) -> str:
    """Who has locked this open file, as far as /proc/locks and the process's command line tell (proc(5))."""
    inode = os.fstat(descriptor).st_ino
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 1234 00:2a:5678 0 EOF
            columns = line.split()
            if columns[1] == "FLOCK" and columns[5].rpartition(":")[2] == str(inode) and columns[4].isdecimal():
                command = Path("/proc", columns[4], "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
                told = command[command.find("installer") :].replace("installer", "sidestep", 1) if command else ""
                return f"process {columns[4]} ({told})" if told.isprintable() and told else f"process {columns[4]}"
    return "another `sidestep trace` or `sidestep explain --try`"


@contextmanager
def deaths_told(pins: Pins) -> Iterator[None]:
    """Within the with block, there are also events of processes that a signal kills (EventKind.KILLED).

    Raises CompileFailed, LibraryMissing or KernelRefused if the programs do not load.
    """
    with ExitStack() as open_:
        with tempfile.TemporaryDirectory(prefix="trace-", dir=pins.top) as scratch:
            load_deaths(pins.maps, Path(scratch))
            for hook, tracepoint in DEATH_HOOKS.items():
                path = Path(scratch) / hook.name
                with Descriptor(syscalls.open_pin(path)) as program:
                    open_.callback(os.close, syscalls.open_raw_tracepoint(tracepoint, program.fd))
                path.unlink()
        yield
