"""A list of the API server, then a watch that goes on where the last one ended.

Whatever fails is tried again with growing pauses, each a little different from node to node.
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

# the resourceVersion of a first list: as old as it may be, for the watch goes on from there and brings it up to date.
# It comes out of the server's memory, where a start of all nodes at once does not hurt
_ANY = "0"
# how long running() waits for the thread at its end, which may be waiting for a server that does not answer
_STOP_SECONDS = 3.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
# a watch that ends sooner counts as a failure: a server that keeps hanging up must not be asked in a loop
_SHORTEST_WATCH = 1.0
# seconds after which everything is listed again, should a server ever forget to tell something
_RESYNC_SECONDS = (1800.0, 3600.0)


class ListWatch(Generic[T]):
    """Tells of one resource while running(): of all there is, and then of each change, in a thread of its own."""

    def __init__(
        self,
        api: Api,
        resource: Resource[T],
        replace: Callable[[list[T]], None],
        apply: Callable[[Change[T]], None],
        longest_pause: float = _LONGEST_PAUSE,
    ) -> None:
        """`replace` is told of each list, the first of which may be old; `apply` of each change but bookmarks."""
        self._api, self._resource = api, resource
        self._replace, self._apply = replace, apply
        self._longest_pause = longest_pause
        self._lock = threading.Lock()
        self._version = _ANY  # of the list or the last event, "" for none that is any good
        self._listed = False  # whether a watch may go on from there
        self._list_again = 0.0
        self._stopping = threading.Event()
        self._watching: Watching[T] | None = None

    def pause(self, seconds: float) -> None:
        """Wait so long, or until running() ends."""
        self._stopping.wait(seconds)

    @contextmanager
    def running(self) -> Iterator[None]:
        """List and watch meanwhile."""
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
            except Expired:
                self._version, self._listed = "", False
                failures += 1
            except ApiFailed as error:
                failures = 1 if time.monotonic() - started > _LONGEST_PAUSE else failures + 1
                self._say(failures, str(error))
            except Exception:
                failures += 1
                self._version, self._listed = "", False
                log.exception("watch.failed", of=self._resource.name)
            if failures:
                longest = min(self._longest_pause, _FIRST_PAUSE * 2 ** min(failures - 1, 10))
                self.pause(random.uniform(0.5, 1.0) * longest)

    def _say(self, failures: int, problem: str) -> None:
        """The first failure in a row, and every eighth after it: an outage must not fill the log."""
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
            try:
                if not self._stopping.is_set():  # else running() may have been too early to close it
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
