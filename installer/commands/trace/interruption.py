"""SIGINT and SIGTERM while events are read: asked once, a trace comes to its end by itself; asked twice it stops."""

import signal
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Use as a context manager: the former handlers come back. Main thread only.

    A first signal raises nothing, as it may arrive in libbpf's callback, where it would be lost. A second one raises
    KeyboardInterrupt: whoever reads our output may have stopped to.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _arrived(self, _: int, __: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
