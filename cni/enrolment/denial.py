"""Denied ports of running pods. All other annotations count only when a pod is enrolled."""

import threading
from collections.abc import Iterable

import structlog

from bpf.errors import SidestepError
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import denial
from cni.enrolment.refusals import for_owners
from cni.policy.annotations import denied_ports
from cni.policy.pod import Pod, PodEvents, PodSource

log = structlog.get_logger("denial")


class Denials:
    """Has enrolled pods deny the ports that their annotations list now. Safe to use from many threads."""

    def __init__(self, enrolments: Enrolments, events: PodEvents) -> None:
        self._enrolments, self._events = enrolments, events
        self._lock = threading.Lock()  # held while a Pod is read and its ports are written, so that the newest wins
        self._refused: dict[str, str] = {}  # Pod's UID or name → the problem, so that it is reported once

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """Apply the annotations of a Pod that is new (`before` is None) or has changed; forget one that is gone."""
        with self._lock:
            if after is None:
                self._refused.pop(_key(before) if before else "", None)
            elif before is None or before.annotations != after.annotations:
                self._refused.pop(_key(after), None)
                self._apply([after])

    def look(self, pods: PodSource) -> None:
        """Apply the annotations of every enrolled pod again.

        changed() cannot apply a change that comes while the pod's ADD is under way. And a table that was full may have
        room by now.
        """
        with self._lock:
            self._apply(pods.every() or ())

    def _apply(self, pods: Iterable[Pod]) -> None:
        """If a Pod's value is refused, the pod denies the same ports as before, and the Pod gets an Event."""
        by_owner = {
            (identity.uid or None, identity.namespace, identity.name): cookie
            for cookie, identity in self._enrolments.identities().items()
        }
        for pod in pods:
            cookie = by_owner.get((pod.uid, pod.namespace, pod.name))
            if cookie is None:
                continue
            try:
                self._deny(cookie, pod)
            except SidestepError as error:
                self._refuse(pod, error)
            else:
                self._refused.pop(_key(pod), None)

    def _deny(self, cookie: int, pod: Pod) -> None:
        """Raises InvalidAnnotation, TableFull."""
        outbound, inbound = denied_ports(pod)
        if self._enrolments.deny(cookie, denial(outbound, inbound)):
            told = {"outbound": _listed(outbound), "inbound": _listed(inbound)}
            log.info("pod.denies", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie, **told)
            self._events.normal(
                pod, "DeniedPortsChanged", f"denied from now on: outbound {told['outbound']}, inbound {told['inbound']}"
            )

    def _refuse(self, pod: Pod, error: SidestepError) -> None:
        problem = str(error)
        if self._refused.get(_key(pod)) == problem:
            return
        self._refused[_key(pod)] = problem
        log.error("pod.denial_refused", pod=f"{pod.namespace}/{pod.name}", problem=problem)
        self._events.warning(pod, "DenialRefused", f"{for_owners(error)}. What was denied before stays denied")


def _key(pod: Pod) -> str:
    return pod.uid or f"{pod.namespace}/{pod.name}"


def _listed(ports: Iterable[int]) -> str:
    return ",".join(map(str, sorted(ports))) or "none"
