"""One thread at a time for each pod, and many pods at a time: no pod's enrolment waits for another pod's."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Turns:
    """Locks by netns cookie, or by whatever names a pod. A lock exists only while somebody has it or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[Hashable, tuple[threading.RLock, int]] = {}  # the lock, and how many threads are at it

    @contextmanager
    def of(self, pod: Hashable) -> Iterator[None]:
        """Keep other threads from this pod until the `with` block ends. A thread may take a turn that it has."""
        with self._guard:
            lock, waiting = self._locks.get(pod, (threading.RLock(), 0))
            self._locks[pod] = lock, waiting + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                waiting = self._locks[pod][1] - 1
                if waiting:
                    self._locks[pod] = lock, waiting
                else:
                    del self._locks[pod]
