"""Tells of an ambient pod's state: istiod by an annotation, the pod's owner by Events.

The annotation is written and never read to find out how things are: after a reboot it says what was true before. The
state itself comes from the kernel's maps and from ztunnel's answers (members.py).
"""

import time
from collections.abc import Callable
from typing import Literal

import structlog

from bpf.errors import SidestepError
from cni.enrolment.refusals import for_owners
from cni.policy.pod import Pod, PodEvents
from installer.pods.api_errors import ApiFailed

log = structlog.get_logger("ambient")

# Istio's name for it: with "enabled", istiod has others send to the pod by HBONE, and istioctl counts it as a member
ANNOTATION = "ambient.istio.io/redirection"
State = Literal["enabled", "pending"]
# seconds for which a server that has not answered is not asked again: hundreds of pods may have to be told of
_SILENCE_SECONDS = 5.0
# writes the annotation, or takes it away; False if the pod is gone; raises ApiFailed
Annotate = Callable[[Pod, str, str | None], bool]


class Redirection:
    """Writes what differs from what the Pod says already. Used by many threads, for one pod by one at a time."""

    def __init__(self, annotate: Annotate, events: PodEvents) -> None:
        self._annotate, self._events = annotate, events
        self._silent_until = 0.0
        self._told: dict[str, str] = {}  # UID → why it is pending, as its Event has it

    def enabled(self, pod: Pod) -> None:
        """The pod is in the mesh: captured, and accepted by ztunnel. Raises ApiFailed."""
        self._write(pod, "enabled")
        if self._told.pop(pod.uid or "", None):
            self._events.normal(pod, "AmbientEnabled", "ztunnel has the pod: its traffic is in the mesh now")

    def pending(self, pod: Pod, error: SidestepError) -> None:
        """The pod should be in the mesh and is not. Its owner is told once for each reason. Raises ApiFailed."""
        why = for_owners(error)
        if self._told.get(pod.uid or "") != why:
            self._told[pod.uid or ""] = why
            log.warning("pod.pending", pod=f"{pod.namespace}/{pod.name}", problem=str(error))
            self._events.warning(pod, "AmbientPending", f"not in the mesh yet: {why}")
        self._write(pod, "pending")

    def absent(self, pod: Pod) -> None:
        """The pod is not in ambient mode. Raises ApiFailed."""
        self._told.pop(pod.uid or "", None)
        self._write(pod, None)

    def forget(self, uid: str) -> None:
        """The pod is gone."""
        self._told.pop(uid, None)

    def _write(self, pod: Pod, state: State | None) -> None:
        if pod.annotations.get(ANNOTATION) == state:
            return
        if time.monotonic() < self._silent_until:
            raise ApiFailed("the API server has not answered a moment ago")
        try:
            is_there = self._annotate(pod, ANNOTATION, state)
        except ApiFailed as error:
            if error.status == 0 or error.status >= 500:
                self._silent_until = time.monotonic() + _SILENCE_SECONDS
            raise
        if is_there:
            log.info("pod.redirection", pod=f"{pod.namespace}/{pod.name}", state=state or "none")
