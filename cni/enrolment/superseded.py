"""The rows of terms that are not in force any more, kept until no program can be at work with them.

A program that has read the number of a policy goes on with it although another is in force by now. If its rows went at
once, it would find half a policy.
"""

import threading
import time
from collections.abc import Callable, Iterable

from bpf.grace import wait_for_programs

Key = tuple[str, bytes]  # name of a table, and a key in it as bytes

# seconds after which a program has certainly ended, where the kernel does not tell: they run for microseconds
_LONG = 5.0


class Superseded:
    """Keys of such rows. Safe to use from many threads."""

    def __init__(self) -> None:
        self._keys: list[tuple[float, set[Key]]] = []
        self._lock = threading.Lock()

    def add(self, keys: Iterable[Key]) -> None:
        """Keep these until a later drop_with()."""
        kept = set(keys)
        with self._lock:
            self._keys += [(time.monotonic(), kept)] if kept else []

    def drop_with(self, drop: Callable[[set[Key]], None]) -> None:
        """Call `drop` with the keys that no program looks at any more. Waits for the programs that run now."""
        with self._lock:
            waiting, self._keys = self._keys, []
        if not waiting:
            return
        are_through = wait_for_programs()
        for since, keys in waiting:
            if are_through or time.monotonic() - since > _LONG:
                drop(keys)
            else:
                with self._lock:
                    self._keys.append((since, keys))
