"""Denied ports of running pods: the one thing in a Pod's annotations that counts while it runs."""

from collections.abc import Iterable

import structlog

from cni.annotations import denied_ports
from cni.enroll import Enrolments
from cni.entries import denial
from cni.errors import InvalidAnnotation
from cni.pod import Pod, PodEvents

log = structlog.get_logger("denial")


class Denials:
    """Brings what enrolled pods deny up to date. Safe to use from many threads."""

    def __init__(self, enrolments: Enrolments, events: PodEvents) -> None:
        self._enrolments, self._events = enrolments, events

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """A Pod is new, has changed or is gone."""
        if after is not None and (before is None or before.annotations != after.annotations):
            self.apply([after])

    def apply(self, pods: Iterable[Pod]) -> None:
        """Have these pods deny what their annotations say. What is refused changes nothing, and its owner is told."""
        by_owner = {
            (identity.uid or None, identity.namespace, identity.name): cookie
            for cookie, identity in self._enrolments.identities().items()
        }
        for pod in pods:
            cookie = by_owner.get((pod.uid, pod.namespace, pod.name))
            if cookie is not None:
                self._apply(cookie, pod)

    def _apply(self, cookie: int, pod: Pod) -> None:
        name = f"{pod.namespace}/{pod.name}"
        try:
            outbound, inbound = denied_ports(pod)
        except InvalidAnnotation as error:
            log.error("pod.denial_refused", pod=name, problem=str(error))
            self._events.warning(pod, "DenialRefused", f"{error}. What was denied before stays denied")
            return
        if self._enrolments.deny(cookie, denial(outbound, inbound)):
            told = {"outbound": _listed(outbound), "inbound": _listed(inbound)}
            log.info("pod.denies", pod=name, netns_cookie=cookie, **told)
            self._events.normal(
                pod, "DeniedPortsChanged", f"denied from now on: outbound {told['outbound']}, inbound {told['inbound']}"
            )


def _listed(ports: Iterable[int]) -> str:
    return ",".join(map(str, sorted(ports))) or "none"
