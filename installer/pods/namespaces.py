"""The labels of the cluster's namespaces, kept up to date from the API server. Only ambient mode needs them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from installer.pods.answers import Change
from installer.pods.api import Api
from installer.pods.listwatch import ListWatch
from installer.pods.resource import NamespaceLabels, namespaces

log = structlog.get_logger("namespaces")

# called at each change with the namespace's name, and its labels before and after; none, if there is no such namespace
Listener = Callable[[str, dict[str, str], dict[str, str]], None]


class ClusterNamespaces:
    """The namespaces of a cluster, while running(). Safe to use from many threads."""

    def __init__(self, api: Api) -> None:
        self._lock = threading.Lock()
        self._labels: dict[str, dict[str, str]] = {}
        self._synced = threading.Event()
        self._listeners: list[Listener] = []
        self._watch = ListWatch(api, namespaces(), self._replace, self._apply)

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` at every change, in the watching thread. Subscribe before running()."""
        self._listeners.append(listener)

    def labels_of(self, name: str) -> dict[str, str] | None:
        """The labels of a namespace; None if it is not known, or not yet."""
        with self._lock:
            return self._labels.get(name)

    def why_stale(self) -> str:
        """Why the namespaces are not known as they are now; "" if they are."""
        return self._watch.why_stale() if self._synced.is_set() else "not listed yet"

    def wait_synced(self, seconds: float) -> bool:
        """Wait for the first list; False if it does not come in time."""
        return self._synced.wait(seconds)

    @contextmanager
    def running(self) -> Iterator[None]:
        """List and watch in a thread until the context ends."""
        with self._watch.running():
            yield

    def _apply(self, change: Change[NamespaceLabels]) -> None:
        thing = change.thing
        if thing is None:
            return
        after = {} if change.kind == "DELETED" else thing.labels
        with self._lock:
            before = self._labels.pop(thing.name, {})
            if change.kind != "DELETED":
                self._labels[thing.name] = after
        self._tell(thing.name, before, after)

    def _replace(self, found: list[NamespaceLabels]) -> None:
        after = {each.name: each.labels for each in found}
        with self._lock:
            before, self._labels = self._labels, dict(after)
        self._synced.set()
        for name in before.keys() | after.keys():
            self._tell(name, before.get(name, {}), after.get(name, {}))

    def _tell(self, name: str, before: dict[str, str], after: dict[str, str]) -> None:
        for listener in self._listeners if before != after else ():
            try:
                listener(name, before, after)
            except Exception:  # a bug there must not end the watch
                log.exception("namespaces.listener_failed")
