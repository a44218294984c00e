"""What running pods follow of their Pods: the ports that they deny, that they are being deleted and, if the pod or the
node wants it so, what they capture. All other annotations count only when a pod is enrolled.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

import structlog

from bpf.errors import SidestepError
from bpf.layout import PodFlags, PortRule
from cni.enrolment.enroll import Change, Enrolments
from cni.enrolment.refusals import for_owners
from cni.enrolment.terms import Terms, denial, terms_of
from cni.errors import InvalidAnnotation
from cni.policy.annotations import FOLLOWED, LATE_OUTBOUND, denied_ports
from cni.policy.pod import Pod, PodEvents, PodSource
from cni.policy.policies import Policies

log = structlog.get_logger("live")

Revision = Callable[[Terms], Terms]
# reasons of Events: of a pod's owner whose annotation is refused
_DENIAL_REFUSED, _POLICY_REFUSED = "DenialRefused", "LivePolicyRefused"
_KEPT = {
    _DENIAL_REFUSED: "What was denied before stays denied",
    _POLICY_REFUSED: "The old policy stays in force",
}


class LivePolicies:
    """Has enrolled pods follow what their annotations say now. Safe to use from many threads."""

    def __init__(self, enrolments: Enrolments, events: PodEvents, policies: Policies | None = None) -> None:
        self._enrolments, self._events = enrolments, events
        self._policies = policies or Policies()
        self._lock = threading.Lock()  # held while a Pod is read and its terms are written, so that the newest wins
        self._refused: dict[str, dict[str, str]] = {}  # Pod's UID or name → reason → the problem, reported once

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """Apply the annotations of a Pod that is new (`before` is None) or has changed; forget one that is gone."""
        with self._lock:
            if after is None:
                self._refused.pop(_key(before) if before else "", None)
            elif before is None or _what_counts(before) != _what_counts(after):
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
        """If a Pod's value is refused, what was in force before stays so, and the Pod gets an Event."""
        by_owner = {
            (identity.uid or None, identity.namespace, identity.name): cookie
            for cookie, identity in self._enrolments.identities().items()
        }
        for pod in pods:
            cookie = by_owner.get((pod.uid, pod.namespace, pod.name))
            if cookie is not None:
                self._follow(cookie, pod)

    def _follow(self, cookie: int, pod: Pod) -> None:
        """Change the pod's terms once, by all of its annotations that make sense: in ambient mode, none of these."""
        entry = self._enrolments.entry(cookie)
        if entry and PodFlags.AMBIENT in PodFlags(entry.flags):
            return
        revisions: list[Revision] = [_ending(pod)]
        problems: dict[str, SidestepError] = {}
        is_live = False
        try:
            revisions.append(_denying(pod))
        except InvalidAnnotation as error:
            problems[_DENIAL_REFUSED] = error
        try:
            is_live = self._policies.is_live(pod)
            revisions.append(self._capturing(pod) if is_live else _at_rest)
        except InvalidAnnotation as error:
            problems[_POLICY_REFUSED] = error
        try:
            change = self._enrolments.change(cookie, lambda terms: _revised(terms, revisions))
        except SidestepError as error:
            self._tell_refused(pod, problems | {_POLICY_REFUSED if is_live else _DENIAL_REFUSED: error})
            return
        if change:
            self._tell_changed(cookie, pod, change)
        self._tell_refused(pod, problems)

    def _capturing(self, pod: Pod) -> Revision:
        """Raises InvalidAnnotation."""
        wanted = terms_of(self._policies.followed(pod))
        return lambda terms: wanted.denying(terms.denied).flagged(PodFlags.DELETED, PodFlags.DELETED in terms.flags)

    def _tell_changed(self, cookie: int, pod: Pod, change: Change) -> None:
        name = f"{pod.namespace}/{pod.name}"
        if PodFlags.DELETED in change.after.flags & ~change.before.flags:
            log.info("pod.ending", pod=name, netns_cookie=cookie, late_outbound="passes once its proxy listens no more")
        before, after = (each.flagged(PodFlags.DELETED, False) for each in change)
        if before.denied != after.denied:
            outbound, inbound = (
                _listed(after.denied, each) for each in (PortRule.DENY_OUTBOUND, PortRule.DENY_INBOUND)
            )
            log.info("pod.denies", pod=name, netns_cookie=cookie, outbound=outbound, inbound=inbound)
            message = f"denied from now on: outbound {outbound}, inbound {inbound}"
            self._events.normal(pod, "DeniedPortsChanged", message)
        if before.denying({}) != after.denying({}) and PodFlags.LIVE_POLICY in after.flags:
            followed = "; ".join(_said(pod))
            log.info("pod.follows", pod=name, netns_cookie=cookie, annotations=followed)
            self._events.normal(pod, "LivePolicyChanged", f"new connections are captured from now on by {followed}")
        elif PodFlags.LIVE_POLICY in before.flags & ~after.flags:
            log.info("pod.follows_no_more", pod=name, netns_cookie=cookie)
            self._events.normal(pod, "LivePolicyChanged", "what is captured stays as it is: changes are not followed")

    def _tell_refused(self, pod: Pod, problems: dict[str, SidestepError]) -> None:
        """Tell of each problem once, and forget those that are over."""
        told = self._refused.pop(_key(pod), {})
        if problems:
            self._refused[_key(pod)] = {reason: str(error) for reason, error in problems.items()}
        for reason, error in problems.items():
            if told.get(reason) == str(error):
                continue
            event = "pod.denial_refused" if reason == _DENIAL_REFUSED else "pod.policy_refused"
            log.error(event, pod=f"{pod.namespace}/{pod.name}", problem=str(error))
            self._events.warning(pod, reason, f"{for_owners(error)}. {_KEPT[reason]}")


def _revised(terms: Terms, revisions: Iterable[Revision]) -> Terms:
    for revise in revisions:
        terms = revise(terms)
    return terms


def _denying(pod: Pod) -> Revision:
    """Raises InvalidAnnotation."""
    denied = denial(*denied_ports(pod))
    return lambda terms: terms.denying(denied)


def _ending(pod: Pod) -> Revision:
    """Only pods that ask for late outbound are told that they are being deleted: to others it means nothing."""
    is_ending = pod.is_deleted and pod.annotations.get(LATE_OUTBOUND) == "allow"
    return lambda terms: terms.flagged(PodFlags.DELETED, is_ending)


def _what_counts(pod: Pod) -> tuple[dict[str, str], bool]:
    return pod.annotations, pod.is_deleted


def _at_rest(terms: Terms) -> Terms:
    """The terms of a pod that follows no more than the ports that it denies."""
    return terms.flagged(PodFlags.LIVE_POLICY, False)


def _said(pod: Pod) -> Iterator[str]:
    """What the Pod says now of what is followed; the defaults, if it says nothing."""
    said = [f'{name} "{pod.annotations[name]}"' for name in FOLLOWED if name in pod.annotations]
    yield from said or ["the defaults: the Pod has none of the annotations that are followed"]


def _key(pod: Pod) -> str:
    return pod.uid or f"{pod.namespace}/{pod.name}"


def _listed(denied: dict[int, PortRule], rule: PortRule) -> str:
    return ",".join(str(port) for port in sorted(denied) if denied[port] & rule) or "none"
