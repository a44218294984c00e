"""Kubernetes Events about pods of this node: what an owner should know, where he looks.

Nothing waits for them: they go through a bounded queue and a thread of their own. The same thing again within the hour
counts the Event there is. While the API server is away they are kept for some minutes, as many as the queue takes.
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
# of a thing that keeps happening the first few are counted at once, the others together, once in so many seconds
_COUNTED_AT_ONCE = 5
_COUNT_SECONDS = 60.0
# at most ten a second: a crowd of refused pods is no reason to load the API server
_PAUSE = 0.1
# pauses while the API server is away, and the age at which what happened is no news
_FIRST_RETRY, _LONGEST_RETRY = 0.5, 30.0
_OLDEST_SECONDS = 600.0
# how long running() waits for the thread at its end, which may be waiting for a server that does not answer
_STOP_SECONDS = 3.0
# a limit that the API server has for the newer kind of Events (apimachinery, core validation of events)
_LONGEST_MESSAGE = 1024
# as pod names go up to the length that an Event's may have (DNS subdomain, 253)
_LONGEST_NAME = 230

# HTTP status of what another attempt may cure: no answer, credentials not renewed yet, too much at once
_PASSING = frozenset((0, 401, 408, 429))


@dataclass
class _Known:
    """An Event that has been made, and how often and when it was last told."""

    name: str
    count: int
    made: float
    told: float


@dataclass(frozen=True)
class _Told:
    """Something to tell. The Event's name is made with it: a second attempt cannot make a second Event."""

    pod: Pod
    kind: str
    reason: str
    message: str
    name: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    until: float = field(default_factory=lambda: time.monotonic() + _OLDEST_SECONDS)

    @property
    def when(self) -> str:
        """RFC 3339."""
        return self.at.strftime("%Y-%m-%dT%H:%M:%SZ")


class ClusterEvents:
    """PodEvents of a cluster, sent while running()."""

    def __init__(self, api: Api, node_name: str) -> None:
        self._api = api
        self._node = node_name
        self._queue: queue.Queue[_Told | None] = queue.Queue(_QUEUE)
        self._known: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()
        self._stopping = threading.Event()
        self._dropping = False

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Something the owner should change."""
        self._tell(pod, "Warning", reason, message)

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Something that was done."""
        self._tell(pod, "Normal", reason, message)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send in a thread of its own meanwhile; what is still queued at the end is sent if the server answers."""
        thread = threading.Thread(target=self._run, name="events", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            with suppress(queue.Full):  # then it finds out without being told
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
            if not self._dropping:  # once a time: the log must not fill up for want of an API server
                log.warning("events.dropping", pod=f"{pod.namespace}/{pod.name}", reason=reason, waiting=_QUEUE)
            self._dropping = True

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._queue.empty()):
            told = self._queue.get()
            if told is None or not self._deliver(told):
                return
            self._stopping.wait(_PAUSE)

    def _deliver(self, told: _Told) -> bool:
        """Send it, again and again if need be; False when there is nothing left to try because the agent ends."""
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
