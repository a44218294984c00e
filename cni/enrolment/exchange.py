"""Exchanges what captures a running pod: Istio's rules for sidestep, and back. No process or connection of it ends.

Taking over: the pod is enrolled while the rules are there. What sidestep redirects passes the rules, and connections
that the rules have redirected keep conntrack's answer about their original destination. So for a moment either may
capture a connection. When sidestep is seen to capture, the rules go.

Giving back is the same in reverse: the rules come first, then the programs decide no more. The enrolment stays until
the proxy has accepted what the programs have redirected.

The rules are kept in a file of the run directory, one a pod, from before they are touched until they are back.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, PodFlags
from bpf.pins import Pins
from cni.enrolment.adoption import Adoption
from cni.enrolment.bystanders import key_of
from cni.enrolment.enroll import Enrolments
from cni.enrolment.strays import processes_of
from cni.enrolment.turns import Turns
from cni.errors import DETACHED, NotExchanged, RulesNotChanged
from cni.netns.istio_rules import RuleSet, forget_answered_queries, istios_rules, put_back, take_away
from cni.netns.namespaces import find_netns
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.sandbox import own_cookie, visit
from cni.policy.pod import Pod, PodEvents, PodSource

log = structlog.get_logger("exchange")

KEPT = "rules"  # the directory in the run directory
_LOCK = "xtables.lock"
# Seconds between enrolling and taking the rules away, and between putting them back and removing the enrolment. A DNS
# query of before has its answer then, and the proxy has accepted what was on its way.
SETTLING = 3.0
_TPROXY = (
    "it is in TPROXY mode, where open connections need the marks that Istio's rules set; create the pod anew instead"
)
_LOOPBACK = "it includes a loopback range, so its rules would redirect once more what sidestep has redirected"


class Kept(BaseModel):
    """What is kept of a pod that was taken over."""

    model_config = ConfigDict(frozen=True)

    namespace: str
    name: str
    uid: str
    rules: list[RuleSet]


class _Standing(Enum):
    """What sidestep does for a pod before it is exchanged."""

    NOT_ENROLLED = auto()
    SHADOW = auto()
    CAPTURED = auto()


class _Place(NamedTuple):
    """Where a pod is: a descriptor of its namespace, and the namespace's cookie."""

    netns: int
    cookie: int


@dataclass(frozen=True)
class Exchange:
    """Takes running pods over from Istio's rules, and gives them back. Safe to use from many threads."""

    adoption: Adoption
    pods: PodSource
    pins: Pins
    run_dir: Path
    skips: Callable[[Pod], str | None]  # why a pod is none of sidestep's
    events: PodEvents
    settling: float = SETTLING
    _turns: Turns = field(default_factory=Turns)
    _under_way: set[int] = field(default_factory=set)

    def take_over(self, namespace: str, name: str) -> str:
        """Have sidestep capture a running pod instead of Istio's rules. Returns what was done.

        Raises SidestepError; the pod is then captured by the rules as before. After a crash in the middle it can be
        asked for again.
        """
        pod = self._pod(namespace, name)
        with self._at(pod) as place:
            rules = visit(place.netns, lambda _: istios_rules())
            before = self._standing(place.cookie)
            if not rules and before is _Standing.CAPTURED:
                return "captured by sidestep already, without rules of Istio's"
            if not rules:
                raise NotExchanged(f"{_title(pod)} has no rules of Istio's; there is nothing to take over")
            self._require_able(pod, rules)
            self._keep(place.cookie, pod, rules)
            try:
                with self._no_stale_queries(pod, place):
                    if before is not _Standing.CAPTURED:
                        self._enrol(pod)
                time.sleep(self.settling)
                self._require_captured(pod, place)
                visit(place.netns, lambda _: self._remove(rules))
            except BaseException:
                self._undo(pod, place, rules, before)
                raise
        log.info("pod.taken_over", pod=_title(pod), netns_cookie=place.cookie)
        self.events.normal(pod, "CaptureTakenOver", "sidestep captures this pod now; Istio's rules are removed")
        return "captured by sidestep; Istio's rules are removed"

    def give_back(self, namespace: str, name: str) -> str:
        """Put Istio's rules back that a pod had before it was taken over, and have them capture it.

        Returns what was done. Raises SidestepError; the pod is then captured by sidestep as before.
        """
        pod = self._pod(namespace, name)
        with self._at(pod) as place:
            kept = self._kept(place.cookie, pod)
            visit(place.netns, lambda _: put_back(kept.rules, self._lock))
            self._end(place.cookie)
            self._file(place.cookie).unlink(missing_ok=True)
        log.info("pod.given_back", pod=_title(pod), netns_cookie=place.cookie)
        self.events.normal(pod, "CaptureGivenBack", "Istio's rules capture this pod again, and sidestep does not")
        return "captured by Istio's rules; sidestep captures it no more"

    def is_under_way(self, cookie: int) -> bool:
        """Whether a pod is being exchanged now, so that for a moment both captures are there."""
        return cookie in self._under_way

    def forget_ended(self) -> None:
        """Remove the rules that are kept of pods that have ended."""
        for path in self._directory.glob("*.json"):
            cookie = int(path.stem)
            with self._turns.of(cookie):  # a pod that is being taken over is not enrolled yet
                if self._enrolments.entry(cookie) is None:
                    path.unlink(missing_ok=True)

    @property
    def _enrolments(self) -> Enrolments:
        return self.adoption.admission.enrolments

    @property
    def _directory(self) -> Path:
        return self.run_dir / KEPT

    @property
    def _lock(self) -> Path:
        return self.run_dir / _LOCK

    def _file(self, cookie: int) -> Path:
        return self._directory / f"{cookie}.json"

    def _pod(self, namespace: str, name: str) -> Pod:
        pod = self.pods.find(namespace, name, None)
        if reason := self.skips(pod):
            raise NotExchanged(f"{_title(pod)} is none of sidestep's: {reason}")
        return pod

    @contextmanager
    def _at(self, pod: Pod) -> Iterator[_Place]:
        """Where a pod is. Nobody else exchanges it meanwhile. Raises SandboxInvalid."""
        with ExitStack() as until:
            netns = self._enrolled_namespace(pod, until) or until.enter_context(self.adoption.namespace_of(pod))
            cookie = visit(netns, lambda _: own_cookie())
            with self._turns.of(cookie):
                self._under_way.add(cookie)
                try:
                    yield _Place(netns, cookie)
                finally:
                    self._under_way.discard(cookie)

    def _enrolled_namespace(self, pod: Pod, until: ExitStack) -> int | None:
        """A descriptor of the namespace that the pod is enrolled for, if it is; `until` closes it."""
        key = key_of(pod.uid, pod.namespace, pod.name)
        identities = self._enrolments.identities()
        cookies = {cookie for cookie, each in identities.items() if key_of(each.uid, each.namespace, each.name) == key}
        inodes = self._enrolments.inodes(cookies)
        if not inodes:
            return None
        found = until.enter_context(find_netns(inodes.keys(), set(inodes.values()), self.adoption.proc))
        return next((netns for _, netns in found), None)

    def _require_able(self, pod: Pod, rules: list[RuleSet]) -> None:
        policy = self.adoption.admission.policies.of(pod)
        if any(each.is_tproxy for each in rules):
            raise NotExchanged(f"{_title(pod)} can't be taken over: {_TPROXY}")
        if policy.loopback_included:
            raise NotExchanged(f"{_title(pod)} can't be taken over: {_LOOPBACK}")

    def _enrol(self, pod: Pod) -> None:
        """Raises the error that keeps the pod from being enrolled."""
        outcome = next(self.adoption.adopt([pod], beside_rules=True), None)
        if outcome is None:
            raise NotExchanged(f"{_title(pod)} has no process any more")
        if outcome.problem:
            raise outcome.error or NotExchanged(f"{_title(pod)} can't be enrolled: {outcome.problem}")

    @contextmanager
    def _no_stale_queries(self, pod: Pod, place: _Place) -> Iterator[None]:
        """Leave as few answered queries as can be in conntrack when a pod's DNS is captured by both."""
        if not self.adoption.admission.policies.of(pod).dns_capture:
            yield
            return
        visit(place.netns, lambda _: forget_answered_queries())  # most of them, which may take a while
        yield
        visit(place.netns, lambda _: forget_answered_queries())  # the few since

    def _require_captured(self, pod: Pod, place: _Place) -> None:
        """Raise NotExchanged unless sidestep is seen to capture all of the pod's connections."""
        if not self._enrolments.is_captured(place.cookie):
            raise NotExchanged(f"{_title(pod)} would not be captured: {DETACHED}")
        if not self._enrolments.listeners(place.cookie):
            raise NotExchanged(
                f"the proxy of {_title(pod)} does not listen on {INBOUND_PORT}; try again when it is ready"
            )
        where = processes_of(self.pins, [place.cookie], self.adoption.proc)[place.cookie]
        if where.is_open:
            raise NotExchanged(f"{_title(pod)} would not be captured as a whole: {where.words}")

    def _remove(self, rules: list[RuleSet]) -> None:
        """Run inside the namespace: take the rules away, and look."""
        take_away(rules, self._lock)
        if is_captured_by_istio():
            raise RulesNotChanged("rules of Istio's are still there after their removal")

    def _standing(self, cookie: int) -> _Standing:
        entry = self._enrolments.entry(cookie)
        if entry is None:
            return _Standing.NOT_ENROLLED
        return _Standing.SHADOW if PodFlags.SHADOW in PodFlags(entry.flags) else _Standing.CAPTURED

    def _undo(self, pod: Pod, place: _Place, rules: list[RuleSet], before: _Standing) -> None:
        """Have the rules capture the pod as before. What fails is logged: the pod is then captured twice, or by us."""
        try:
            visit(place.netns, lambda _: put_back(rules, self._lock))
            if before is _Standing.SHADOW:
                self._enrolments.watch_only(place.cookie)
            elif before is _Standing.NOT_ENROLLED:
                self._end(place.cookie)
            self._file(place.cookie).unlink(missing_ok=True)
        except SidestepError as error:
            log.error("pod.not_put_back", pod=_title(pod), netns_cookie=place.cookie, error=str(error))

    def _end(self, cookie: int) -> None:
        """End an enrolment while Istio's rules are there: first the programs decide no more, then it is removed."""
        if self._enrolments.watch_only(cookie):
            time.sleep(self.settling)
        self.adoption.admission.follower.forget(cookie)
        self._enrolments.remove(cookie)
        for slot in self._enrolments.listeners(cookie):  # the proxy listens on
            self._enrolments.drop_listener(cookie, slot)

    def _keep(self, cookie: int, pod: Pod, rules: list[RuleSet]) -> None:
        """Keep a pod's rules. What is kept of it stays: after a crash only a part of its rules may be there."""
        with suppress(NotExchanged):
            self._kept(cookie, pod)
            return
        kept = Kept(namespace=pod.namespace, name=pod.name, uid=pod.uid or "", rules=rules)
        path = self._file(cookie)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            written = path.with_suffix(".new")
            written.write_text(kept.model_dump_json())
            written.rename(path)
        except OSError as error:
            raise NotExchanged(f"the rules of {_title(pod)} can't be kept in {path}: {error.strerror}") from error

    def _kept(self, cookie: int, pod: Pod) -> Kept:
        """What is kept of a pod. Raises NotExchanged."""
        path = self._file(cookie)
        try:
            kept = Kept.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise NotExchanged(
                f"{_title(pod)} was not taken over from Istio's rules, so there are none to give it back to; create "
                "the pod anew"
            ) from None
        except (OSError, ValidationError) as error:
            raise NotExchanged(f"the rules of {_title(pod)} can't be read from {path}: {error}") from error
        if kept.uid != (pod.uid or ""):
            raise NotExchanged(f"{path} has the rules of another pod, {kept.namespace}/{kept.name}; remove the file")
        return kept


def kept_pods(run_dir: Path) -> list[tuple[str, str]]:
    """The namespaces and names of the pods that were taken over, by the rules that are kept of them."""
    found = []
    for path in (run_dir / KEPT).glob("*.json"):
        with suppress(OSError, ValidationError):
            kept = Kept.model_validate_json(path.read_bytes())
            found.append((kept.namespace, kept.name))
    return found


def _title(pod: Pod) -> str:
    return f"{pod.namespace}/{pod.name}"
