"""Kubernetes Events about pods of this node, so that a pod's owner finds messages where owners look.

Events go through a bounded queue and a thread of their own, so no caller waits for them. If the same thing happens
again within the hour, the existing Event is counted up. While the API server is away, Events wait for up to ten
minutes; an Event that finds the queue full is dropped.
"""

import queue
import random
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog

from cni.policy.pod import Pod
from installer.pods.api import Api
from installer.pods.api_errors import ApiFailed

log = structlog.get_logger("events")

_COMPONENT = "sidestep"
_QUEUE = 256
_REMEMBERED = 512
_REPEAT_SECONDS = 3600.0
# if a thing keeps happening, the first few repetitions are counted at once, later ones together once a minute
_COUNTED_AT_ONCE = 5
_COUNT_SECONDS = 60.0
# seconds between Events, so at most ten a second: many refused pods at once must not load the API server
_PAUSE = 0.1
# seconds between attempts while the API server is away, and the age at which an Event is dropped as old
_FIRST_RETRY, _LONGEST_RETRY = 0.5, 30.0
_OLDEST_SECONDS = 600.0
# seconds that running() waits at its end for the thread, which may be waiting for a server that does not answer
_STOP_SECONDS = 3.0
# the API server's limit for the newer kind of Events (validation of events in Kubernetes' core API)
_LONGEST_MESSAGE = 1024
# the pod's name in the Event's name is cut to this length: both may have 253 characters (a DNS subdomain)
_LONGEST_NAME = 230

# HTTP statuses after which another attempt may succeed: no answer (0), credentials not renewed yet (401), timeout
# (408), too many requests (429)
_PASSING = frozenset((0, 401, 408, 429))


@dataclass
class _Known:
    """An Event that exists: how often it happened, when it was created and last sent (seconds, monotonic clock)."""

    name: str
    count: int
    made: float
    told: float


@dataclass(frozen=True)
class _Told:
    """An Event to send. Its name is fixed from the beginning, so that a second attempt can't create a second Event."""

    pod: Pod
    kind: str
    reason: str
    message: str
    name: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    until: float = field(default_factory=lambda: time.monotonic() + _OLDEST_SECONDS)

    @property
    def when(self) -> str:
        """The time of the Event, RFC 3339."""
        return self.at.strftime("%Y-%m-%dT%H:%M:%SZ")


class ClusterEvents:
    """PodEvents that are sent to the API server while running()."""

    def __init__(self, api: Api, node_name: str) -> None:
        self._api = api
        self._node = node_name
        self._queue: queue.Queue[_Told | None] = queue.Queue(_QUEUE)
        self._known: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()
        self._stopping = threading.Event()
        self._dropping = False

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Report something that the owner should change; `reason` is CamelCase."""
        self._tell(pod, "Warning", reason, message)

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Report something that was done; `reason` is CamelCase."""
        self._tell(pod, "Normal", reason, message)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send in a thread until the context ends. Events that are queued then are sent if the server answers."""
        thread = threading.Thread(target=self._run, name="events", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            with suppress(queue.Full):  # if the queue is full, the thread sees _stopping
                self._queue.put_nowait(None)
            thread.join(_STOP_SECONDS)
            if thread.is_alive() or not self._queue.empty():
                log.warning("events.dropped", left=self._queue.qsize(), why="the agent has ended")

    def _tell(self, pod: Pod, kind: str, reason: str, message: str) -> None:
        name = f"{pod.name[:_LONGEST_NAME].rstrip('.-')}.{secrets.token_hex(8)}"
        try:
            self._queue.put_nowait(_Told(pod, kind, reason, message, name))
            self._dropping = False
        except queue.Full:
            if not self._dropping:  # log once until the queue has room again
                log.warning("events.dropping", pod=f"{pod.namespace}/{pod.name}", reason=reason, waiting=_QUEUE)
            self._dropping = True

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._queue.empty()):
            told = self._queue.get()
            if told is None or not self._deliver(told):
                return
            self._stopping.wait(_PAUSE)

    def _deliver(self, told: _Told) -> bool:
        """Send an Event, with as many attempts as needed. False if the agent ends and the server does not answer."""
        pause = _FIRST_RETRY
        while True:
            try:
                self._send(told)
            except ApiFailed as error:
                may_pass = error.status in _PASSING or error.status >= 500
                if may_pass and self._stopping.is_set():
                    return False
                if may_pass and time.monotonic() < told.until:
                    self._stopping.wait(pause * random.uniform(0.7, 1.3))
                    pause = min(2 * pause, _LONGEST_RETRY)
                    continue
                pod = f"{told.pod.namespace}/{told.pod.name}"
                log.warning("event.failed", pod=pod, reason=told.reason, error=str(error))
            except Exception:
                log.exception("event.failed")
            return True

    def _send(self, told: _Told) -> None:
        key = (told.pod.uid or "", told.reason, told.message)
        now = time.monotonic()
        known = self._known.get(key)
        if known and now - known.made < _REPEAT_SECONDS:
            count = known.count + 1
            if count > _COUNTED_AT_ONCE and now - known.told < _COUNT_SECONDS:
                known.count = count
                return
            if self._api.repeat_event(told.pod.namespace, known.name, count, told.when):
                known.count, known.told = count, now
                return
        self._api.create_event(told.pod.namespace, self._event(told))
        self._known[key] = _Known(told.name, 1, now, now)
        self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _event(self, told: _Told) -> dict[str, Any]:
        pod = told.pod
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": told.name, "namespace": pod.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": pod.namespace,
                "name": pod.name,
                "uid": pod.uid or "",
                "resourceVersion": pod.metadata.resource_version,
            },
            "type": told.kind,
            "reason": told.reason,
            "message": told.message[:_LONGEST_MESSAGE],
            "source": {"component": _COMPONENT, "host": self._node},
            "reportingComponent": _COMPONENT,
            "reportingInstance": self._node,
            "firstTimestamp": told.when,
            "lastTimestamp": told.when,
            "count": 1,
        }
