"""Exchanges what captures a running pod: Istio's rules for sidestep, and back. No process or connection of it ends.

Taking over: the pod is enrolled while the rules are there, first as a shadow pod, for which the programs change
nothing. If all is seen that capture needs, they begin to capture. What they redirect passes the rules, and connections
that the rules have redirected keep conntrack's answer about their original destination: for a moment either may capture
a connection. Then the rules go.

Giving back is the reverse: the rules come first, then the programs capture nothing more. The enrolment stays until the
proxy has accepted what they have redirected.

The rules are kept in a file of the run directory, one a pod, from before they are touched until they are back. An agent
that finds such a file at its start completes what another one has left in the middle. At every step either the rules
are all there, or the programs capture.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict

from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, PodFlags
from bpf.pins import Pins
from cni.enrolment.adoption import Adoption
from cni.enrolment.bystanders import key_of
from cni.enrolment.enroll import Enrolments
from cni.enrolment.strays import processes_of
from cni.enrolment.turns import Turns
from cni.errors import DETACHED, NotExchanged
from cni.netns.istio_rules import (
    RuleSet,
    are_there,
    forget_answered_queries,
    forget_unanswered_connections,
    istios_rules,
    put_back,
    take_away,
)
from cni.netns.namespaces import find_netns
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.sandbox import own_cookie, visit
from cni.policy.annotations import CapturePolicy
from cni.policy.pod import Pod, PodEvents, PodSource

log = structlog.get_logger("exchange")

KEPT = "rules"  # the directory in the run directory
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

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Standing(Enum):
    """What sidestep does for a pod."""

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

        Raises SidestepError; the pod is then captured by the rules as before, unless the words say otherwise.
        """
        pod = self.pods.find(namespace, name, None)
        if reason := self.skips(pod):
            raise NotExchanged(f"it is none of sidestep's: {reason}")
        with self._at(pod) as place:
            rules, before = visit(place.netns, lambda _: istios_rules()), self._standing(place.cookie)
            if not rules and before is _Standing.CAPTURED:
                self._require_whole(place)
                return "captured by sidestep already, without rules of Istio's"
            if not rules:
                raise NotExchanged("it has no rules of Istio's; there is nothing to take over")
            policy = self._require_able(pod, rules)
            is_fresh = self._keep(place.cookie, pod, rules)
            try:
                self._begin(pod, policy, place, before)
                with self._enrolments.undisturbed(place.cookie):
                    self._require_captured(place)
                    visit(place.netns, lambda _: take_away(rules, self._lock(place.cookie)))
            except BaseException as error:
                self._undo(pod, place, before, is_fresh, error)
                raise
        log.info("pod.taken_over", pod=_title(pod), netns_cookie=place.cookie)
        self.events.normal(pod, "CaptureTakenOver", "sidestep captures this pod now; Istio's rules are removed")
        return "captured by sidestep; Istio's rules are removed"

    def give_back(self, namespace: str, name: str) -> str:
        """Put Istio's rules back that a pod had before it was taken over, and have them capture it.

        Returns what was done. Raises SidestepError; the pod is then captured by sidestep as before.
        """
        pod = self.pods.find(namespace, name, None)
        with self._at(pod) as place:
            kept = self._kept(place.cookie, pod)
            visit(place.netns, lambda _: self._restore(kept, place.cookie))
            self._end(place.cookie)
            self._file(place.cookie).unlink(missing_ok=True)
        log.info("pod.given_back", pod=_title(pod), netns_cookie=place.cookie)
        self.events.normal(pod, "CaptureGivenBack", "Istio's rules capture this pod again, and sidestep does not")
        return "captured by Istio's rules; sidestep captures it no more"

    def taken_over(self) -> list[str]:
        """NAMESPACE/NAME of each pod that was taken over and lives, sorted. What is kept of others is removed."""
        self._forget_ended()
        found = map(self._read, self._files().values())
        return sorted({str(kept) for kept in found if kept})

    def is_under_way(self, cookie: int) -> bool:
        """Whether a pod is being exchanged now, so that for a moment both captures are there."""
        return cookie in self._under_way

    def complete(self) -> None:
        """Complete what an earlier agent has left in the middle: never neither the rules nor capture, at best not both.

        Called before pods are adopted. What fails is logged.
        """
        try:
            self._forget_ended()
            cookies = self._files().keys()
            with find_netns(cookies, proc=self.adoption.proc) as found:
                for cookie, netns in found if cookies else ():
                    self._try_to_complete(_Place(netns, cookie))
        except (SidestepError, OSError) as error:
            log.error("exchange.not_completed", error=str(error))

    def _try_to_complete(self, place: _Place) -> None:
        kept = self._read(self._file(place.cookie))
        try:
            if kept:
                self._complete(place, kept)
        except SidestepError as error:
            log.error("exchange.not_completed", pod=str(kept), error=str(error))

    def _complete(self, place: _Place, kept: Kept) -> None:
        """A captured pod keeps no part of its rules. Any other one gets all of them back."""
        are_all_there = visit(place.netns, lambda _: are_there(kept.rules))
        if self._standing(place.cookie) is not _Standing.CAPTURED:
            if not are_all_there:
                visit(place.netns, lambda _: self._restore(kept, place.cookie))
                log.warning("exchange.completed", pod=str(kept), done="Istio's rules are put back")
            self._file(place.cookie).unlink(missing_ok=True)
        elif not are_all_there and visit(place.netns, lambda _: is_captured_by_istio()):
            visit(place.netns, lambda _: take_away(kept.rules, self._lock(place.cookie)))
            log.warning("exchange.completed", pod=str(kept), done="Istio's rules are removed")

    def _forget_ended(self) -> None:
        """Remove what is kept of pods whose namespaces are gone."""
        paths = self._files()
        doubtful = paths.keys() - set(self._enrolments.cookies()) - self._under_way
        if not doubtful:
            return
        with find_netns(doubtful, proc=self.adoption.proc) as found:
            alive = {cookie for cookie, _ in found}
        for cookie in doubtful - alive - self._under_way:
            paths[cookie].unlink(missing_ok=True)

    def _files(self) -> dict[int, Path]:
        """The files of what is kept, by netns cookie."""
        return {int(path.stem): path for path in self._directory.glob("*.json") if path.stem.isdigit()}

    @property
    def _enrolments(self) -> Enrolments:
        return self.adoption.admission.enrolments

    @property
    def _directory(self) -> Path:
        return self.run_dir / KEPT

    def _lock(self, cookie: int) -> Path:
        return self._directory / f"{cookie}.lock"

    def _file(self, cookie: int) -> Path:
        return self._directory / f"{cookie}.json"

    def _standing(self, cookie: int) -> _Standing:
        entry = self._enrolments.entry(cookie)
        if entry is None:
            return _Standing.NOT_ENROLLED
        return _Standing.SHADOW if PodFlags.SHADOW in PodFlags(entry.flags) else _Standing.CAPTURED

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
                    self._lock(cookie).unlink(missing_ok=True)

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

    def _require_able(self, pod: Pod, rules: list[RuleSet]) -> CapturePolicy:
        """The pod's policy. Raises NotExchanged if such a pod can't be taken over."""
        policy = self.adoption.admission.policies.of(pod)
        if policy.mode == "TPROXY" or any(each.is_tproxy for each in rules):
            raise NotExchanged(f"it can't be taken over: {_TPROXY}")
        if policy.loopback_included:
            raise NotExchanged(f"it can't be taken over: {_LOOPBACK}")
        return policy

    def _begin(self, pod: Pod, policy: CapturePolicy, place: _Place, before: _Standing) -> None:
        """Have sidestep capture the pod beside its rules, if all is there that this takes."""
        if before is not _Standing.CAPTURED:
            outcome = next(self.adoption.adopt([pod], beside_rules=True), None)
            if outcome is None:
                raise NotExchanged("it has no process any more")
            if outcome.problem:
                raise outcome.error or NotExchanged(f"it can't be enrolled: {outcome.problem}")
        self._require_whole(place)
        if policy.dns_capture:
            visit(place.netns, lambda _: forget_answered_queries())  # most of them, which may take a while
        self._enrolments.capture_again(place.cookie)
        if policy.dns_capture:
            visit(place.netns, lambda _: forget_answered_queries())  # the few since
        time.sleep(self.settling)

    def _require_captured(self, place: _Place) -> None:
        """Raise NotExchanged unless sidestep is seen to capture all of the pod's connections."""
        if self._standing(place.cookie) is not _Standing.CAPTURED:
            raise NotExchanged("sidestep does not capture it any more; somebody has enrolled it anew meanwhile")
        self._require_whole(place)

    def _require_whole(self, place: _Place) -> None:
        """Raise NotExchanged unless all is seen that capture needs: programs, link, proxy, and no stray process."""
        if not self._enrolments.is_captured(place.cookie):
            raise NotExchanged(f"it would not be captured: {DETACHED}")
        if not self._enrolments.listeners(place.cookie):
            raise NotExchanged(f"its proxy is not seen to listen on {INBOUND_PORT}; try again when it does")
        where = processes_of(self.pins, [place.cookie], self.adoption.proc)[place.cookie]
        if where.is_open:
            raise NotExchanged(f"it would not be captured as a whole: {where.words}")

    def _restore(self, kept: Kept, cookie: int) -> None:
        """Run inside the namespace: put the rules back, also for connections that have not been answered yet."""
        put_back(kept.rules, self._lock(cookie))
        forget_unanswered_connections()

    def _undo(self, pod: Pod, place: _Place, before: _Standing, is_fresh: bool, why: BaseException) -> None:
        """Have the rules capture the pod as before. Raises NotExchanged that says what is true if they can't."""
        try:
            kept = self._kept(place.cookie, pod)
            visit(place.netns, lambda _: self._restore(kept, place.cookie))
        except (SidestepError, OSError) as error:
            log.error("pod.not_put_back", pod=_title(pod), netns_cookie=place.cookie, error=str(error))
            raise NotExchanged(
                f"{why}; and Istio's rules could not be put back: {error}. sidestep goes on capturing it, beside what "
                "is left of them"
            ) from error
        if before is _Standing.NOT_ENROLLED:
            self._end(place.cookie)
        elif before is _Standing.SHADOW:
            self._enrolments.watch_only(place.cookie)
        if is_fresh:
            self._file(place.cookie).unlink(missing_ok=True)

    def _end(self, cookie: int) -> None:
        """End an enrolment while Istio's rules are there: first the programs capture no more, then it is removed."""
        if self._standing(cookie) is _Standing.CAPTURED:
            self._enrolments.watch_only(cookie)
            time.sleep(self.settling)
        self.adoption.admission.follower.forget(cookie)
        self._enrolments.remove(cookie)
        for slot in self._enrolments.listeners(cookie):  # the proxy listens on
            self._enrolments.drop_listener(cookie, slot)

    def _keep(self, cookie: int, pod: Pod, rules: list[RuleSet]) -> bool:
        """Keep a pod's rules. Returns False if that is done: later only a part of its rules may be there."""
        path = self._file(cookie)
        if path.exists():
            self._kept(cookie, pod)
            return False
        kept = Kept(namespace=pod.namespace, name=pod.name, uid=pod.uid or "", rules=rules)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            written = path.with_suffix(".new")
            written.write_text(kept.model_dump_json())
            written.rename(path)
        except (OSError, ValueError) as error:
            raise NotExchanged(f"its rules can't be kept in {path}: {error}") from error
        return True

    def _kept(self, cookie: int, pod: Pod) -> Kept:
        """What is kept of a pod. Raises NotExchanged."""
        path = self._file(cookie)
        if not path.exists():
            raise NotExchanged(
                "it was not taken over from Istio's rules, so there are none to give it back to; create the pod anew"
            )
        kept = self._read(path)
        if kept is None:
            raise NotExchanged(f"what is kept of it can't be read: {path}")
        if kept.uid != (pod.uid or ""):
            raise NotExchanged(f"{path} has the rules of another pod, {kept}; remove the file")
        return kept

    @staticmethod
    def _read(path: Path) -> Kept | None:
        """What a file has; None if that can't be read, which is logged."""
        try:
            return Kept.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            log.error("exchange.unreadable", file=str(path), error=str(error))
            return None


def _title(pod: Pod) -> str:
    return f"{pod.namespace}/{pod.name}"
