"""Kubernetes Events about pods of this node: what an owner should know, where he looks.

Nothing waits for them: they go through a bounded queue and a thread of their own. The same thing again within the hour
counts the Event there is.
"""

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from cni.pod import Pod
from installer.pods.api import Api
from installer.pods.errors import ApiFailed

log = structlog.get_logger("events")

_COMPONENT = "sidestep"
_QUEUE = 256
_REMEMBERED = 512
_REPEAT_SECONDS = 3600.0
# at most ten a second: a crowd of refused pods is no reason to load the API server
_PAUSE = 0.1
# the API server refuses longer ones (apimachinery, core validation of events)
_LONGEST_MESSAGE = 1024


@dataclass
class _Known:
    """An Event that has been made."""

    name: str
    count: int
    made: float


@dataclass(frozen=True)
class _Told:
    """Something to tell."""

    pod: Pod
    kind: str
    reason: str
    message: str


class ClusterEvents:
    """PodEvents of a cluster, sent while running()."""

    def __init__(self, api: Api, node_name: str) -> None:
        self._api = api
        self._node = node_name
        self._queue: queue.Queue[_Told | None] = queue.Queue(_QUEUE)
        self._known: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Something the owner should change."""
        self._tell(_Told(pod, "Warning", reason, message))

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Something that was done."""
        self._tell(_Told(pod, "Normal", reason, message))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send in a thread of its own meanwhile; what is still queued at the end is sent if the server answers."""
        thread = threading.Thread(target=self._run, name="events")
        thread.start()
        try:
            yield
        finally:
            try:
                self._queue.put(None, timeout=1)
            except queue.Full:
                log.warning("events.dropped", left=self._queue.qsize())
                while not self._queue.empty():
                    self._queue.get_nowait()
                self._queue.put(None)
            thread.join()

    def _tell(self, told: _Told) -> None:
        try:
            self._queue.put_nowait(told)
        except queue.Full:
            log.warning("event.dropped", pod=f"{told.pod.namespace}/{told.pod.name}", reason=told.reason)

    def _run(self) -> None:
        while (told := self._queue.get()) is not None:
            try:
                self._send(told)
            except ApiFailed as error:  # once is enough: the log has it too, and the next round tells it again
                log.warning("event.failed", reason=told.reason, error=str(error))
            except Exception:
                log.exception("event.failed")
            time.sleep(_PAUSE)

    def _send(self, told: _Told) -> None:
        key = (told.pod.uid or "", told.reason, told.message)
        known = self._known.get(key)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if known and time.monotonic() - known.made < _REPEAT_SECONDS:
            known.count += 1
            if self._api.repeat_event(told.pod.namespace, known.name, known.count, now):
                return
        name = f"{told.pod.name[:200]}.{secrets.token_hex(8)}"
        self._api.create_event(told.pod.namespace, self._event(told, name, now))
        self._known[key] = _Known(name, 1, time.monotonic())
        self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _event(self, told: _Told, name: str, now: str) -> dict[str, Any]:
        pod = told.pod
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": pod.namespace},
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
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
