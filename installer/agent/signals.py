"""SIGTERM and SIGINT: end what is running in an orderly way, whatever that is at the moment."""

import signal
from collections.abc import Callable
from types import FrameType

import structlog

log = structlog.get_logger("agent")


class Stopped(SystemExit):
    """A signal arrived while nothing was there yet that could be asked to stop."""


class Signals:
    """Use as a context manager: the former handlers come back. Main thread only."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._before: dict[int, object] = {}
        self._last: int | None = None

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._last is not None:
            log.info("agent.stopped", signal=signal.Signals(self._last).name)

    def call(self, stop: Callable[[], None], wakes: int) -> None:
        """From now on a signal calls `stop`; until then it raises Stopped, exit status 0.

        `wakes` is the descriptor, not blocking, at whose other end the main thread waits; the signal writes there.
        Python calls handlers between two instructions only, so one that arrives just before the main thread's system
        call, or in another thread, would call `stop` when that system call returns, which may be never.
        """
        self._stop = stop
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)

    def _arrived(self, number: int, _: FrameType | None) -> None:
        """Logs nothing: what it interrupts may be writing a line of the log, and hold the lock for that."""
        self._last = number
        if self._stop is None:
            raise Stopped(0)
        self._stop()
