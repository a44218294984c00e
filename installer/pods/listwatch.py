"""Lists a resource on the API server, then watches it; each watch continues where the last one ended.

After a failure it tries again, with growing pauses that differ a little from node to node.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import structlog

from installer.pods.answers import Change, Watching
from installer.pods.api import Api
from installer.pods.api_errors import ApiFailed, Expired
from installer.pods.resource import Resource

log = structlog.get_logger("watch")
T = TypeVar("T")

# resourceVersion of the first list: any age will do, because the watch brings it up to date. The server answers from
# memory, so even a start of all nodes at once does no harm
_ANY = "0"
# seconds that running() waits at its end for the thread, which may be waiting for a server that does not answer
_STOP_SECONDS = 3.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
# seconds; a watch that ends sooner counts as a failure, so that we pause if a server keeps hanging up
_SHORTEST_WATCH = 1.0
# seconds of failures after which what is known counts as old; a watch that breaks off is mostly back sooner
_STALE_SECONDS = 5.0
# seconds after which everything is listed again, in case the server missed sending a change
_RESYNC_SECONDS = (1800.0, 3600.0)


class ListWatch(Generic[T]):
    """Keeps callbacks up to date with one resource while running(): a list of everything, then each change."""

    def __init__(
        self,
        api: Api,
        resource: Resource[T],
        replace: Callable[[list[T]], None],
        apply: Callable[[Change[T]], None],
        longest_pause: float = _LONGEST_PAUSE,
    ) -> None:
        """Set what to watch, and the callbacks, which run in the thread of running().

        `replace` gets each list; the first list may be old. `apply` gets each change, but no bookmarks. `longest_pause`
        is the longest time between attempts, in seconds.
        """
        self._api, self._resource = api, resource
        self._replace, self._apply = replace, apply
        self._longest_pause = longest_pause
        self._lock = threading.Lock()
        self._version = _ANY  # of the list or the last event; "" if the server expired it
        self._listed = False  # whether a watch may continue from that version
        self._list_again = 0.0
        self._stopping = threading.Event()
        self._watching: Watching[T] | None = None
        self._failing: tuple[float, str] | None = None  # since when, on the monotonic clock, and the last problem

    def why_stale(self) -> str:
        """Why the callbacks do not know the newest state; "" if they do, or if the watch has just been interrupted."""
        failing = self._failing
        seconds = time.monotonic() - failing[0] if failing else 0.0
        return f"for {seconds:.0f} s: {failing[1]}" if failing and seconds > _STALE_SECONDS else ""

    def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until running() ends."""
        self._stopping.wait(seconds)

    @contextmanager
    def running(self) -> Iterator[None]:
        """List and watch in a thread until the context ends."""
        thread = threading.Thread(target=self._run, name=self._resource.name, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            with self._lock:
                if self._watching:
                    self._watching.close()
            thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._list_and_watch()
                short = time.monotonic() - started < _SHORTEST_WATCH
                failures = failures + 1 if short else 0
            except Expired as error:
                self._version, self._listed = "", False
                failures += 1
                self._fails(str(error))
            except ApiFailed as error:
                failures = 1 if time.monotonic() - started > _LONGEST_PAUSE else failures + 1
                self._fails(str(error))
                self._say(failures, str(error))
            except Exception as error:
                failures += 1
                self._fails(f"internal error: {error}")
                self._version, self._listed = "", False
                log.exception("watch.failed", of=self._resource.name)
            if failures:
                longest = min(self._longest_pause, _FIRST_PAUSE * 2 ** min(failures - 1, 10))
                self.pause(random.uniform(0.5, 1.0) * longest)

    def _fails(self, problem: str) -> None:
        self._failing = (self._failing[0] if self._failing else time.monotonic(), problem)

    def _say(self, failures: int, problem: str) -> None:
        """Log the first failure in a row, and every eighth after it: an outage must not fill the log."""
        if not self._stopping.is_set() and failures % 8 == 1:
            log.warning("watch.api_away", of=self._resource.name, failures=failures, problem=problem)

    def _list_and_watch(self) -> None:
        if not self._listed or time.monotonic() > self._list_again:
            things, self._version = self._api.list_all(self._resource, self._version)
            self._listed = True
            self._list_again = time.monotonic() + random.uniform(*_RESYNC_SECONDS)
            self._replace(things)
        with self._api.watch(self._resource, self._version) as watching:
            with self._lock:
                self._watching = watching
            self._failing = None
            try:
                if not self._stopping.is_set():  # running() may have ended before there was a watch to close
                    self._follow(watching)
            finally:
                with self._lock:
                    self._watching = None

    def _follow(self, watching: Watching[T]) -> None:
        for change in watching.changes():
            if change.thing is not None:
                self._apply(change)
            self._version = change.version or self._version
            if time.monotonic() > self._list_again:
                return
