"""SIGTERM and SIGINT end the agent in an orderly way, at any moment of its life."""

import signal
from collections.abc import Callable
from types import FrameType

import structlog

log = structlog.get_logger("agent")


class Stopped(SystemExit):
    """A signal arrived before there was a server to stop. Undoes the start and ends the process."""


class Signals:
    """A context manager that handles both signals and puts the former handlers back. Main thread only."""

    def __init__(self, limit: int = 0) -> None:
        """`limit` is the number of seconds after a signal at which the kernel ends the process (SIGALRM); 0 is never.

        What an agent keeps is in the kernel, so ending it at any moment is safe.
        """
        self._limit = limit
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
        """Make signals call `stop` from now on. Until then a signal raises Stopped (exit status 0).

        `wakes` is a non-blocking descriptor; the main thread waits at its other end. Each signal writes a byte to it.
        Without that byte `stop` might never run: Python calls handlers only between two instructions of the main
        thread. A signal that arrives just before a system call of the main thread, or in another thread, would wait
        until the system call returns.
        """
        self._stop = stop
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)

    def _arrived(self, number: int, _: FrameType | None) -> None:
        """Handle a signal. Logs nothing: the interrupted code may be logging and hold the lock of the log."""
        self._last = number
        if self._limit:
            signal.alarm(self._limit)  # also goes on after __exit__(): the interpreter waits for threads at its end
        if self._stop is None:
            raise Stopped(0)
        self._stop()
