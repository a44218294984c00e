"""Pods of this node from the API server.

One thread keeps a cache up to date. Lookups read the cache. Only if a Pod is not there yet, a lookup asks the server.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from cni.errors import PodNotFound
from cni.policy.pod import Pod
from installer.pods.answers import Change
from installer.pods.api import Api
from installer.pods.api_errors import ApiFailed
from installer.pods.listwatch import ListWatch
from installer.pods.resource import pods_of

log = structlog.get_logger("pods")

# called at each change with the Pod before and after it; None means there was, or is, none
Listener = Callable[[Pod | None, Pod | None], None]

# annotation of a static pod's mirror in the API: the UID by which kubelet and the runtime know the static pod
_MIRROR = "kubernetes.io/config.mirror"
# seconds that one find() may take: the plugin waits 10 for its answer
_FIND_SECONDS = 8.0
# seconds between the requests of a find(); a request without an answer uses up the time by itself
_FIND_PAUSES = (0.5, 1.0)


class ClusterPods:
    """A PodSource of one node, kept up to date while running(). Safe to use from many threads."""

    def __init__(self, api: Api, node_name: str) -> None:
        self._api = api
        self._node = node_name
        self._lock = threading.Lock()
        self._pods: dict[str, Pod] = {}  # by UID: for a while an old and a new Pod may have the same name
        self._synced = threading.Event()
        self._watch = ListWatch(api, pods_of(node_name), self._replace, self._apply)
        self._listeners: list[Listener] = []
        self._when_synced: list[Callable[[], None]] = []

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` at every change, in the watching thread. Subscribe before running()."""
        self._listeners.append(listener)

    def on_synced(self, call: Callable[[], None]) -> None:
        """Call `call` after the first list, in the watching thread. Register before running()."""
        self._when_synced.append(call)

    @property
    def is_synced(self) -> bool:
        """Whether the Pods have been listed once. From then on the cache is usable, if old, even without API server."""
        return self._synced.is_set()

    def why_stale(self) -> str:
        """Why the Pods are not known as they are now: not listed yet, or the watch fails. "" if they are known."""
        return self._watch.why_stale() if self.is_synced else "not listed yet"

    def wait_synced(self, seconds: float) -> bool:
        """Wait for the first list; False if it does not come in time."""
        return self._synced.wait(seconds)

    def every(self) -> list[Pod] | None:
        """All Pods of the node; None before the first list."""
        with self._lock:
            return list(self._pods.values()) if self.is_synced else None

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        """The Pod, from the cache or the API server. Takes up to _FIND_SECONDS.

        Raises PodNotFound, whose code tells the runtime to try again.
        """
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
            self._watch.pause(pause * random.uniform(0.7, 1.3))
        raise PodNotFound(f"Pod {namespace}/{name} (UID {uid or 'not given'}) not found: {problem}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """List and watch in a thread until the context ends."""
        with self._watch.running():
            yield

    def _apply(self, change: Change[Pod]) -> None:
        pod = change.thing
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
        """The cached Pod of that name and UID; without a UID, the one that is not being deleted. None if not cached."""
        with self._lock:
            named = [pod for pod in self._pods.values() if (pod.namespace, pod.name) == (namespace, name)]
        wanted = (pod for pod in named if _is(pod, uid) and (uid or pod.metadata.deletion_timestamp is None))
        return next(wanted, None)


def _is(pod: Pod, uid: str | None) -> bool:
    """Whether the runtime's UID (None: not given) is this Pod's, or its static pod's."""
    return uid in (None, pod.uid, pod.annotations.get(_MIRROR))
