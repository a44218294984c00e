"""Takes running pods over from another layout of the maps: after an upgrade or a roll-back to other maps.

bpf/takeover.py says how two layouts run side by side. This module brings every running pod of the other layout into
this version's maps and then retires the other. If an entry is the same in both versions, it has been copied when the
programs were attached. Otherwise the pod is enrolled anew, by what its Pod says now, and its proxy's listeners are
fetched. The other layout stays attached, and captures, until the last running pod is found.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from bpf import takeover
from bpf.attachment import retire_others
from bpf.errors import KernelRefused, SidestepError
from bpf.layout import PodFlags
from bpf.layouts import steered
from bpf.pins import Pins
from cni.enrolment.adoption import Adoption
from cni.enrolment.ambient import ambient_policy_of_flags
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, on_uncaptured
from cni.netns.namespaces import find_netns
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.pod import Pod, PodEvents, PodSource

log = structlog.get_logger("takeover")


@dataclass
class TakeOver:
    """Takes over what is left to take over, each time it is asked to."""

    pins: Pins
    enrolments: Enrolments
    adoption: Adoption
    pods: PodSource
    events: PodEvents
    _told: set[str] = field(default_factory=set)  # pods that could not be enrolled, reported once
    _waiting: Counter[str] = field(default_factory=Counter)  # pod that is not taken over → times seen

    def take(self) -> Mapping[str, int]:
        """Take over the running pods of other layouts. If all are taken, retire those layouts."""
        others = takeover.attached_others(self.pins)
        if not others:
            takeover.clear_retired(self.pins)
            return {}
        adopted = 0
        for other in others:
            entries = takeover.entries_of_pods(other)
            pods = self._matching(entries)
            adopted += self._enrol(pods, entries)
            self._steer(other, pods)
            if left := self._left(other, entries):
                for cookie in left:
                    self._tell(other, takeover.name_in(entries.get(cookie, b"")) or str(cookie), pods.get(cookie))
                return {"adopted": adopted} if adopted else {}
        retire_others(self.pins)
        log.info("layout.taken_over", layouts=" ".join(each.name for each in others), pods=len(self.enrolments))
        return {"adopted": adopted} if adopted else {}

    def _matching(self, entries: Mapping[int, bytes]) -> dict[int, Pod]:
        """The Pods that another layout's entries are about: netns cookie → Pod."""
        by_uid = {pod.uid: pod for pod in self.pods.every() or () if pod.uid}
        nameless = [pod for pod in self.pods.every() or () if not pod.uid]
        found = {}
        for cookie, entry in entries.items():
            by_name = (pod for pod in nameless if takeover.has_texts(entry, pod.name, pod.namespace))
            if pod := by_uid.get(takeover.uid_in(entry)) or next(by_name, None):
                found[cookie] = pod
        return found

    def _enrol(self, pods: Mapping[int, Pod], entries: Mapping[int, bytes]) -> int:
        """Enrol the pods that are in no map of this layout yet; returns how many were enrolled.

        `entries` are those of the other layout: a default that has changed since is for new pods.
        """
        own, count = set(self.enrolments.cookies()), 0
        flags = {cookie: takeover.flags_in(entry) for cookie, entry in entries.items()}
        modes = {cookie: on_uncaptured(each) for cookie, each in flags.items()}
        left = {cookie: pod for cookie, pod in pods.items() if cookie not in own}
        ambient = {cookie: pod for cookie, pod in left.items() if PodFlags.AMBIENT in flags[cookie]}
        left = {cookie: pod for cookie, pod in left.items() if cookie not in ambient}
        policies = {cookie: ambient_policy_of_flags(flags[cookie]) for cookie in ambient}
        count += self._enrol_ambient(ambient, policies)
        for outcome in self.adoption.adopt_known(left, modes):
            if outcome.cookie:
                count += 1
            elif outcome.problem and outcome.problem not in self._told:
                self._told.add(outcome.problem)
                name = f"{outcome.pod.namespace}/{outcome.pod.name}"
                log.error("pod.not_taken_over", pod=name, error=outcome.problem)
        return count

    def _enrol_ambient(self, pods: Mapping[int, Pod], policies: Mapping[int, AmbientPolicy]) -> int:
        """Enrol pods in ambient mode as they are enrolled in the other layout; returns how many were enrolled."""
        count = 0
        with find_netns(pods, proc=self.adoption.proc) as found:
            for cookie, netns in found:
                pod = pods[cookie]
                identity = Identity(pod.uid or "", pod.name, pod.namespace, "", "", "eth0")
                try:
                    count += self.adoption.admission.adopt(identity, policies[cookie], netns)
                except SidestepError as error:
                    if str(error) not in self._told:
                        self._told.add(str(error))
                        log.error("pod.not_taken_over", pod=f"{pod.namespace}/{pod.name}", error=str(error))
        return count

    def _steer(self, other: Path, pods: Mapping[int, Pod]) -> None:
        """Move the steering links of enrolled pods here. A pod whose listeners are not known here keeps the other's."""
        ours, shared = steered(self.pins.root), takeover.shares_listeners(self.pins, other)
        waiting = {
            cookie: inode
            for cookie, inode in steered(other).items()
            if cookie not in ours and self.enrolments.entry(cookie) is not None
        }
        if not shared:
            unheard = {cookie: inode for cookie, inode in waiting.items() if not self.enrolments.listeners(cookie)}
            self.adoption.listen(unheard, pods)
        heard = takeover.heard_by(other) if waiting and not shared else set()
        for cookie in waiting:
            if cookie not in heard or self.enrolments.listeners(cookie):
                with suppress(KernelRefused):  # its namespace has gone by now, or it is tried again
                    takeover.take_steering(self.pins, other, cookie)
                self.enrolments.retain(cookie)

    def _left(self, other: Path, entries: Iterable[int]) -> list[int]:
        """The running pods of another layout that this one does not capture in both directions."""
        running = set(steered(other))
        if unsteered := set(entries) - running - set(self.enrolments.cookies()):
            with find_netns(unsteered, proc=self.adoption.proc) as found:
                running |= {cookie for cookie, _ in found}
        ours = steered(self.pins.root).keys() & set(self.enrolments.cookies())
        return sorted(running - ours)

    def _tell(self, other: Path, name: str, pod: Pod | None) -> None:
        """Say once of a pod that it is still the other layout's: the second time, as pods are looked for in between."""
        self._waiting[name] += 1
        if self._waiting[name] != 2:
            return
        why = "another version of sidestep still captures this pod, because this one has not found it"
        log.warning("layout.kept", layout=other.name, pod=name, reason=why)
        if pod:
            self.events.warning(pod, "NotTakenOver", why)
