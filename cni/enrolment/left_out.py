"""Remembers the pods that are not captured, so that each is told of once for the same reason.

The plugin and the agent let pods pass at ADD; the watch sees running pods with a sidecar. Both come here. What is known
lives in memory only: a later agent begins with nothing, and learns from the watch what the watch can tell.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import structlog

from cni.enrolment.known_pods import KnownPods
from cni.policy.pod import NoEvents, Pod, PodEvents

log = structlog.get_logger("cni")


class LetPass(NamedTuple):
    """A pod that was let pass at ADD. A sandbox without a namespace or without a name is not a Kubernetes pod."""

    namespace: str
    name: str
    uid: str
    container_id: str
    reason: str

    @property
    def is_kubernetes(self) -> bool:
        """Whether there is a Pod of this sandbox."""
        return bool(self.namespace and self.name)

    @property
    def title(self) -> str:
        """The pod's name; of another sandbox, its container."""
        return f"{self.namespace}/{self.name}" if self.is_kubernetes else f"container {self.container_id}"


@dataclass
class _Known:
    uid: str
    reason: str
    container_id: str = ""  # "" if the watch alone knows the pod, or after its DEL
    has_left: bool = False  # whether its DEL has come
    was_owner_told: bool = False  # whether there is an Event

    def is_of(self, uid: str) -> bool:
        return self.uid == uid or not (self.uid and uid)

    def is_about(self, uid: str, reason: str) -> bool:
        return self.reason == reason and self.is_of(uid)


class LeftOut:
    """The pods of one node that are not captured, within the limit of KnownPods. Any thread may call."""

    def __init__(self, events: PodEvents | None = None) -> None:
        self._events: PodEvents = events or NoEvents()
        self._known: KnownPods[_Known] = KnownPods()
        self._lock = threading.Lock()

    def let_pass(self, pod: LetPass) -> None:
        """Note that a pod was let pass at its ADD, and log it.

        It gets no Event: most pods of a cluster are not in the mesh, and nobody asks why. If the Pod has a sidecar, the
        watch tells its owner once it runs.
        """
        key = (pod.namespace, pod.name) if pod.is_kubernetes else ("", pod.container_id)
        with self._lock:
            known = self._known.get(key)
            is_new = known is None or known.has_left or not known.is_about(pod.uid, pod.reason)
            if known is None or is_new:
                self._known.forget(key)
                known = _Known(pod.uid, pod.reason)
            self._known.put(key, replace(known, uid=pod.uid, container_id=pod.container_id))
        if is_new:
            log.info("pod.skipped", pod=pod.title, container=pod.container_id, reason=pod.reason)

    def is_running(self, pod: Pod, reason: str) -> None:
        """Tell the owner of a running Pod with a sidecar that it is left out, and log what its ADD has not logged."""
        key, uid = (pod.namespace, pod.name), pod.uid or ""
        with self._lock:
            known = self._known.get(key)
            is_known = known is not None and known.is_about(uid, reason)
            if known and is_known and (known.was_owner_told or known.has_left):
                self._known.note_listed(key)
                return
            container = known.container_id if known and known.is_of(uid) else ""
            self._known.put(key, _Known(uid, reason, container, was_owner_told=True))
            self._known.note_listed(key)
        if not is_known:
            log.info("pod.not_captured", pod=f"{pod.namespace}/{pod.name}", reason=reason)
        self._events.normal(pod, "NotCaptured", f"sidestep does not capture this pod: {reason}")

    def leave(self, container_id: str) -> None:
        """Note the DEL of a container. What was said of its pod stays known: the watch may have it a while longer."""
        with self._lock:
            for _, known in self._known.every():
                if known.container_id == container_id:
                    known.container_id, known.has_left = "", True

    def keep_listed(self, pods: Iterable[Pod]) -> None:
        """Forget the pods that an earlier list had and this one has not. Those that no list had yet stay."""
        with self._lock:
            self._known.keep_listed(pods)

    def let_past(self) -> list[LetPass]:
        """The pods that were let pass and whose DEL has not come, in the order in which they came."""
        with self._lock:
            known = self._known.every()
        return [
            LetPass(namespace, name if namespace else "", each.uid, each.container_id, each.reason)
            for (namespace, name), each in known
            if each.container_id
        ]
