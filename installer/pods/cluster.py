"""Pods of this node as the API server has them: a list, then a watch that goes on where the last one ended.

One thread keeps the cache; whoever asks for a Pod gets it from there, and only for one that is not there yet a request
is made. Whatever fails is tried again with growing pauses, each a little different from node to node.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from cni.errors import PodNotFound
from cni.pod import Pod
from installer.pods.answers import Change, Watching
from installer.pods.api import Api
from installer.pods.errors import ApiFailed, Expired

log = structlog.get_logger("pods")

# told of each change: what was known before, and what is now; None for not there
Listener = Callable[[Pod | None, Pod | None], None]

# the resourceVersion of a first list: as old as it may be, for the watch goes on from there and brings it up to date.
# It comes out of the server's memory, where a start of all nodes at once does not hurt
_ANY = "0"
# what kubelet calls a static pod by: not the UID of the object that stands for it in the API, but this annotation of it
_MIRROR = "kubernetes.io/config.mirror"
# how long running() waits for the thread at its end, which may be waiting for a server that does not answer
_STOP_SECONDS = 3.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
# a watch that ends sooner counts as a failure: a server that keeps hanging up must not be asked in a loop
_SHORTEST_WATCH = 1.0
# seconds after which everything is listed again, should a server ever forget to tell something
_RESYNC_SECONDS = (1800.0, 3600.0)
# how long one find() may take: the plugin waits 10 s for its answer
_FIND_SECONDS = 8.0
# pauses between its requests; a request that nobody answers uses up the time by itself
_FIND_PAUSES = (0.5, 1.0)


class ClusterPods:
    """A PodSource of one node, kept up to date while running(). Safe to use from many threads."""

    def __init__(self, api: Api, node_name: str) -> None:
        self._api = api
        self._node = node_name
        self._lock = threading.Lock()
        self._pods: dict[str, Pod] = {}  # by UID: a name may belong to an old and a new Pod for a while
        self._version = _ANY  # of the list or the last event, "" for none that is any good
        self._listed = False  # whether a watch may go on from there
        self._list_again = 0.0
        self._synced = threading.Event()
        self._stopping = threading.Event()
        self._watching: Watching | None = None
        self._listeners: list[Listener] = []
        self._when_synced: list[Callable[[], None]] = []

    def subscribe(self, listener: Listener) -> None:
        """Tell `listener` of every change from now on, in the watching thread; before running()."""
        self._listeners.append(listener)

    def on_synced(self, call: Callable[[], None]) -> None:
        """Call after the first list, in the watching thread; before running()."""
        self._when_synced.append(call)

    @property
    def is_synced(self) -> bool:
        """Whether the Pods have been listed once. They are then good, if old, even while the API server is away."""
        return self._synced.is_set()

    def wait_synced(self, seconds: float) -> bool:
        """Wait for the first list; False when it does not come in time."""
        return self._synced.wait(seconds)

    def every(self) -> list[Pod] | None:
        """All Pods of the node; None before the first list."""
        with self._lock:
            return list(self._pods.values()) if self.is_synced else None

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        """The Pod, from the cache or the API server. Raises PodNotFound: the runtime may try again."""
        deadline = time.monotonic() + _FIND_SECONDS
        problem = "the API server does not know it"
        for pause in (*_FIND_PAUSES, 0.0):
            if pod := self._cached(namespace, name, uid):
                return pod
            try:
                found = self._api.get_pod(namespace, name, max(0.1, deadline - time.monotonic()))
            except ApiFailed as error:
                problem = str(error)
            else:
                if found is not None and _is(found, uid):
                    return found
                problem = f"it has UID {found.uid} now" if found else "the API server does not know it"
                break
            if pause == 0 or time.monotonic() + pause > deadline:
                break
            self._stopping.wait(pause * random.uniform(0.7, 1.3))
        raise PodNotFound(f"Pod {namespace}/{name} (UID {uid or 'not given'}) cannot be had: {problem}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """List and watch in a thread of its own meanwhile."""
        thread = threading.Thread(target=self._run, name="pods", daemon=True)
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
                log.exception("pods.failed")
            if failures:
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(failures - 1, 10))
                self._stopping.wait(random.uniform(0.5, 1.0) * longest)

    def _say(self, failures: int, problem: str) -> None:
        """The first failure in a row, and every eighth after it: an outage must not fill the log."""
        if not self._stopping.is_set() and failures % 8 == 1:
            log.warning("pods.api_away", node=self._node, failures=failures, problem=problem)

    def _list_and_watch(self) -> None:
        if not self._listed or time.monotonic() > self._list_again:
            pods, self._version = self._api.list_pods(self._node, self._version)
            self._listed = True
            self._list_again = time.monotonic() + random.uniform(*_RESYNC_SECONDS)
            self._replace(pods)
        with self._api.watch_pods(self._node, self._version) as watching:
            with self._lock:
                self._watching = watching
            try:
                if not self._stopping.is_set():  # else running() may have been too early to close it
                    self._follow(watching)
            finally:
                with self._lock:
                    self._watching = None

    def _follow(self, watching: Watching) -> None:
        for change in watching.changes():
            self._apply(change)
            self._version = change.version or self._version
            if time.monotonic() > self._list_again:
                return

    def _apply(self, change: Change) -> None:
        pod = change.pod
        if pod is None or not pod.uid:
            return
        with self._lock:
            before = self._pods.pop(pod.uid, None)
            if change.kind != "DELETED":
                self._pods[pod.uid] = pod
        self._tell(before, None if change.kind == "DELETED" else pod)

    def _replace(self, pods: list[Pod]) -> None:
        with self._lock:
            before = self._pods
            self._pods = {pod.uid: pod for pod in pods if pod.uid}
            after = dict(self._pods)
        first = not self.is_synced
        self._synced.set()
        if first:
            log.info("pods.listed", node=self._node, pods=len(after))
        for uid in before.keys() | after.keys():
            if before.get(uid) != after.get(uid):
                self._tell(before.get(uid), after.get(uid))
        for call in self._when_synced if first else ():
            call()

    def _tell(self, before: Pod | None, after: Pod | None) -> None:
        for listener in self._listeners:
            try:
                listener(before, after)
            except Exception:
                log.exception("pods.listener_failed")

    def _cached(self, namespace: str, name: str, uid: str | None) -> Pod | None:
        """By UID; without one, the Pod of that name that is not on its way out."""
        with self._lock:
            named = [pod for pod in self._pods.values() if (pod.namespace, pod.name) == (namespace, name)]
        wanted = (pod for pod in named if _is(pod, uid) and (uid or pod.metadata.deletion_timestamp is None))
        return next(wanted, None)


def _is(pod: Pod, uid: str | None) -> bool:
    """Whether the runtime means this Pod."""
    return uid in (None, pod.uid, pod.annotations.get(_MIRROR))
