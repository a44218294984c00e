"""Reading what the programs tell: one reader a node, which takes events out of the ring as they come.

The programs tell nothing unless somebody's interest is fresh, so a reader that was killed costs nothing for long.
"""

import ctypes
import fcntl
import os
import threading
import time
from contextlib import suppress

from bpf import syscalls
from bpf.errors import KernelRefused, SidestepError
from bpf.kernel import possible_cpus
from bpf.layout import Event, TracingEntry, Word
from bpf.pins import Pins

_LIBBPF = ctypes.CDLL("libbpf.so.1", use_errno=True)
_Take = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBBPF.ring_buffer__new.argtypes = [ctypes.c_int, _Take, ctypes.c_void_p, ctypes.c_void_p]
_LIBBPF.ring_buffer__new.restype = ctypes.c_void_p
_LIBBPF.ring_buffer__consume.argtypes = [ctypes.c_void_p]
_LIBBPF.ring_buffer__free.argtypes = [ctypes.c_void_p]

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
        self._tracing = pins.open_map("tracing")
        self._lost = pins.open_map("lost")
        self._ring = 0
        try:
            self._lock = _lock(pins)
            events = syscalls.open_pin(pins.maps / "events")
            self._callback = _Take(self._hand_over)
            self._ring = _LIBBPF.ring_buffer__new(events, self._callback, None, None)
            os.close(events)
            if not self._ring:
                raise KernelRefused(f"ring_buffer__new({pins.maps / 'events'}): {os.strerror(ctypes.get_errno())}")
            self._lost_before = self._count_lost()
            self._consume()  # what an earlier reader has left is nobody's business
            self._write(_until())
        except BaseException:
            self._close()
            raise
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
        self._closing.set()
        self._renewing.join()
        self._write(0)
        self._close()

    def _consume(self) -> list[bytes]:
        _LIBBPF.ring_buffer__consume(self._ring)
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
        row = (ctypes.c_uint64 * possible_cpus())()
        syscalls.map_lookup(self._lost, Word(0), row)
        return sum(row)

    def _write(self, until: int) -> None:
        if number := syscalls.map_update(self._tracing, Word(0), TracingEntry(until, self._cookie)):
            raise syscalls.refused("bpf_map_update_elem", "tracing", number)

    def _close(self) -> None:
        if self._ring:
            _LIBBPF.ring_buffer__free(self._ring)
            self._ring = 0
        for name in ("_tracing", "_lost", "_lock"):
            if hasattr(self, name):
                os.close(getattr(self, name))
                delattr(self, name)


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
