"""Keeps the node's ambient pods as their labels ask: captured by the kernel, and accepted by ztunnel.

A pod is in the mesh if the network namespace that its processes are in now is enrolled in the kernel's maps, and a
ztunnel has accepted that very namespace. Both are looked at; no annotation and no memory of an earlier ADD counts. A
pass compares this with what the labels ask for and puts right what differs: at the start, when pods, namespaces or
ztunnels change, and every few minutes. What fails is tried again, with growing pauses.
"""

import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from bpf.errors import SidestepError
from cni.enrolment.entries import Identity
from cni.enrolment.turns import Turns
from cni.enrolment.whose_netns import Inhabited
from cni.errors import CniError, Code
from cni.netns.sandbox import own_cookie, visit
from cni.policy.ambient_annotations import ambient_policy_of
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.membership import STATUS
from cni.policy.pod import Pod
from installer.ambient.attempts import Attempts
from installer.ambient.connection import Held, ZtunnelAway
from installer.ambient.node import Node
from installer.ambient.protocol import Workload
from installer.ambient.redirection import ANNOTATION, Redirection
from installer.ambient.server import ZdsServer

log = structlog.get_logger("ambient")

# the periodic pause varies by this share, so that many nodes do not ask the API server at the same moment
_JITTER = 0.1
_SHORTEST_PAUSE = 0.05  # seconds between two passes
# Seconds for which ztunnel may be away until pods are called pending for it: an agent that starts waits for it, and a
# ztunnel that restarts comes back soon. If an enabled pod changes, istiod configures all its callers anew.
_AWAY_SECONDS, _ENABLED_AWAY_SECONDS = 2.0, 30.0
# passes with all pods in which an enrolled pod is not listed until it counts as gone: the list may be older than an ADD
_TIMES_MISSING = 2
_ENDED = 1024  # namespaces that are remembered after their DEL: four times the pods of a large node


class NotReady(CniError):
    """It is not known yet whether the Pod is in ambient mode, or ztunnel has not taken it; the runtime tries again."""

    code = Code.TRY_AGAIN_LATER


class Members:
    """The ambient pods of one node. Any thread may call; running() keeps everything as it should be."""

    def __init__(self, node: Node, socket: Path) -> None:
        """`socket` is the path where ztunnel connects."""
        self._node = node
        self.zds = ZdsServer(socket, self._snapshot, self.wake, node.recognise)
        self._redirection = Redirection(node.annotate, node.events)
        self._turns = Turns()  # by UID
        self._lock = threading.Lock()
        self._changed: set[str] = set()  # UIDs to look at
        self._is_asked = False  # whether there is something to look at
        self._ended: OrderedDict[int, None] = OrderedDict()  # cookies of namespaces whose DEL has come
        self._all = False  # whether to look at every pod
        self._failed: dict[str, tuple[Pod, SidestepError]] = {}  # ADDs that have failed, by UID, to be told
        self._attempts = Attempts()
        self._missing: Counter[str] = Counter()
        self._wake = threading.Event()
        self._stopping = False

    def why_not(self, pod: Pod) -> str | None:
        """Why a Pod is not in ambient mode; None if it is. Raises NotReady if its namespace is not known."""
        labels = self._node.namespaces.labels_of(pod.namespace)
        if labels is None:
            raise NotReady(f"the labels of namespace {pod.namespace} are not known; try again")
        return self._node.enablement.why_not(pod, labels)

    def enrol(self, pod: Pod, identify: Callable[[Identity | None], Identity], netns: int) -> int:
        """Bring a pod in at its ADD: capture, ztunnel's acceptance, annotation. Returns the namespace's cookie.

        All of it or nothing: raises SidestepError if a step fails, and a pod that was not captured before is not
        captured then. kubelet tries again.
        """
        uid = pod.uid or ""
        policy = ambient_policy_of(pod, self._node.policy)
        with self._turns.of(uid):
            was_there = self._node.capture.whose(visit(netns, lambda _: own_cookie())) == uid
            cookie = self._node.capture.admit(pod, identify, policy, netns)
            with self._lock:
                self._ended.pop(cookie, None)
            try:
                self.zds.add(_workload(pod), netns, cookie)
                self._redirection.enabled(pod)
            except SidestepError as error:
                if not was_there:
                    self._node.capture.leave(cookie)
                with self._lock:
                    self._failed[uid] = pod, error
                self.wake()
                raise NotReady(f"{pod.namespace}/{pod.name} is not in the mesh yet: {error}") from error
        return cookie

    def policy_of(self, pod: Pod) -> AmbientPolicy | None:
        """What is captured of a Pod in ambient mode; None if it is not in it. Raises NotReady, InvalidAnnotation."""
        return None if self.why_not(pod) else ambient_policy_of(pod, self._node.policy)

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """Handle a Pod that is new, has changed, or is gone (`after` is None)."""
        pod = after or before
        if pod is None or (before and after and _what_counts(before) == _what_counts(after)):
            return
        self._look_at([pod.uid or ""])

    def namespace_changed(self, name: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Handle a namespace with other labels: its pods may come in or leave."""
        if self._node.enablement.flips(before, after):
            self._look_at(pod.uid or "" for pod in self._node.pods.every() or () if pod.namespace == name)

    def removed(self, cookie: int) -> None:
        """Handle a DEL: this namespace is not captured any more, and is not captured again, whoever is still in it."""
        with self._lock:
            self._ended[cookie] = None
            while len(self._ended) > _ENDED:
                self._ended.popitem(last=False)
        self._look_at([])

    def wake(self) -> None:
        """Look at all pods now."""
        with self._lock:
            self._all = True
        self._wake.set()

    def states(self) -> Counter[str]:
        """How many pods are captured and accepted ("enabled"), and how many should be and are not ("pending")."""
        enabled, pending = self._by_state()
        return Counter(enabled=len(enabled), pending=len(pending))

    def document(self) -> dict[str, Any]:
        """Each pod with its state, and the ztunnels: what WHO_IS_AMBIENT is answered with (cni/verbs.py)."""
        names = {pod.uid: f"{pod.namespace}/{pod.name}" for pod in self._node.pods.every() or ()}
        enabled, pending = self._by_state()
        reasons, away = self._attempts.reasons(), self.zds.why_away()
        rows = [
            {"pod": names.get(uid, f"UID {uid}"), "uid": uid, "state": state, "reason": reasons.get(uid, why)}
            for state, uids, why in (
                ("ambient", enabled, ""),
                ("pending", pending, away or "ztunnel has not accepted it yet"),
            )
            for uid in uids
        ]
        rows.sort(key=lambda row: row["pod"])
        return {"ztunnels": self.zds.connected, "problem": away, "pods": rows}

    def _by_state(self) -> tuple[set[str], set[str]]:
        """UIDs: of the pods that are captured and accepted, and of those that should be and are not."""
        enrolled = self._node.capture.enrolled()
        enabled = {uid for cookie, uid in enrolled.items() if self.zds.holds(uid) == cookie}
        return enabled, (set(enrolled.values()) | self._attempts.known()) - enabled

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """Serve ztunnel, and run a pass about every `seconds`, until the context ends. Raises SidestepError."""
        with self.zds.running():
            thread = threading.Thread(target=self._run, args=(seconds,), name="ambient")
            thread.start()
            try:
                yield
            finally:
                self._stopping = True
                self._wake.set()
                thread.join()

    def once(self, only: Collection[str] | None = None) -> None:
        """Compare all pods, or those with these UIDs, with what their labels ask for, and put right what differs."""
        pods = self._node.pods.every()
        if pods is None:
            return
        listed = {pod.uid: pod for pod in pods if pod.uid}
        wanted, unknown = {}, set()
        for uid, pod in listed.items():
            if only is not None and uid not in only:
                continue
            try:
                if self.why_not(pod) is None:
                    wanted[uid] = pod
            except NotReady:
                unknown.add(uid)
        self._tell_of_adds()
        self._release({uid for uid in listed if (only is None or uid in only) and uid not in wanted} - unknown, listed)
        self._take_back()
        if only is None:
            self._take_back_missing(listed.keys())
        self._bring_in(wanted, is_thorough=only is None)
        for uid in self._attempts.known() - listed.keys():
            self._attempts.forget(uid)
            self._redirection.forget(uid)

    def _run(self, seconds: float) -> None:
        due = 0.0
        while not self._stopping:
            with self._lock:
                changed, self._changed = self._changed, set()
                everything, self._all = self._all or time.monotonic() >= due, False
                is_asked, self._is_asked = self._is_asked, False
            now = time.monotonic()
            if everything:
                due = now + seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
            changed |= self._attempts.due()
            try:
                if everything or changed or is_asked:
                    self.once(None if everything else changed)
            except Exception:  # a bug must not end the thread
                log.exception("ambient.failed")
            self._wake.wait(max(_SHORTEST_PAUSE, min(due, self._attempts.next_due()) - time.monotonic()))
            self._wake.clear()

    def _look_at(self, uids: Iterable[str]) -> None:
        with self._lock:
            self._changed.update(uids)
            self._is_asked = True
        self._wake.set()

    def _tell_of_adds(self) -> None:
        """Tell of the ADDs that have failed: their threads have no time for it."""
        with self._lock:
            failed, self._failed = self._failed, {}
        for uid, (pod, error) in failed.items():
            with self._turns.of(uid):
                if self.zds.holds(uid) is None:  # no later ADD has succeeded
                    self._note_failure(pod, error, is_patient=False)

    def _release(self, uids: set[str], listed: Mapping[str, Pod]) -> None:
        """Let go of pods that are not in ambient mode, or not any more."""
        enrolled: dict[str, list[int]] = {}
        for cookie, uid in self._node.capture.enrolled().items():
            enrolled.setdefault(uid, []).append(cookie)
        for uid in uids:
            pod = listed[uid]
            self._attempts.forget(uid)
            if uid not in enrolled and ANNOTATION not in pod.annotations:
                continue
            with self._turns.of(uid):
                for cookie in enrolled.get(uid, ()):
                    self._node.capture.leave(cookie)
                    log.info("pod.left", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie)
                self._let_go(uid)
                try:
                    self._redirection.absent(pod)
                except SidestepError as error:
                    self._attempts.failed(uid, str(error))
                    log.warning("annotation.not_removed", pod=f"{pod.namespace}/{pod.name}", error=str(error))

    def _take_back(self) -> None:
        """Take pods back from ztunnel whose namespaces are not captured any more: after a DEL, or in a new sandbox."""
        held = self.zds.held()  # first: what is accepted was captured before
        enrolled = self._node.capture.enrolled()
        for uid, cookie in held:
            if enrolled.get(cookie) != uid:
                with self._turns.of(uid):
                    if self.zds.holds(uid) == cookie and self._node.capture.whose(cookie) != uid:
                        self._let_go(uid)

    def _take_back_missing(self, listed: Collection[str]) -> None:
        """Take pods back from ztunnel that are gone. ztunnel keeps their namespaces alive, so nobody else notices.

        ztunnel may have more than it has accepted from this agent: what an earlier one has handed over, and it was told
        to keep.
        """
        missing = ({uid for uid, _ in self.zds.held()} | set(self._node.capture.enrolled().values())) - set(listed)
        self._missing = Counter({uid: self._missing[uid] + 1 for uid in missing})
        for uid, times in self._missing.items():
            if times >= _TIMES_MISSING:
                with self._turns.of(uid):
                    self._let_go(uid)

    def _let_go(self, uid: str) -> None:
        try:
            self.zds.delete(uid)
        except SidestepError as error:  # _take_back() tries again
            log.warning("ztunnel.keeps", uid=uid, error=str(error))

    def _bring_in(self, wanted: dict[str, Pod], is_thorough: bool) -> None:
        """Have these pods captured, accepted and annotated, as far as they are not.

        A thorough pass looks for the namespaces of all of them: a pod may be in another than the one that is captured.
        """
        left = wanted if is_thorough else {uid: pod for uid, pod in wanted.items() if not self._is_done(uid, pod)}
        away = ""
        for each in self._node.inhabited(list(left.values())):
            left.pop(each.pod.uid or "", None)
            try:
                self._settle(each, away)
                self._attempts.forget(each.pod.uid or "")
            except SidestepError as error:
                if isinstance(error, ZtunnelAway):
                    away = str(error)
                self._note_failure(each.pod, error)
        for uid, pod in left.items():
            if self._is_in(uid):  # and without a process that could be elsewhere
                self._affirm(pod)
            elif pod.is_running:
                self._note_failure(pod, SidestepError("its processes are not found on this node"))

    def _affirm(self, pod: Pod) -> None:
        """Annotate a pod that is in the mesh."""
        try:
            self._redirection.enabled(pod)
            self._attempts.forget(pod.uid or "")
        except SidestepError as error:
            self._attempts.failed(pod.uid or "", str(error))
            log.warning("annotation.not_written", pod=f"{pod.namespace}/{pod.name}", error=str(error))

    def _is_done(self, uid: str, pod: Pod) -> bool:
        """Whether there is nothing to do for a pod now, as far as it can be told without a look for its namespace."""
        if uid in self._attempts.known():
            return uid not in self._attempts.due()
        return self._is_in(uid) and pod.annotations.get(ANNOTATION) == "enabled"

    def _is_in(self, uid: str) -> bool:
        """Whether a namespace of a pod is captured, and a ztunnel has accepted that very namespace."""
        cookie = self.zds.holds(uid)
        return cookie is not None and self._node.capture.whose(cookie) == uid

    def _settle(self, each: Inhabited, away: str) -> None:
        """Capture a running pod, hand it over, and annotate it, unless that is done. Raises SidestepError.

        `away` says why ztunnel need not be asked in this pass: one time-out is enough.
        """
        pod, netns = each.pod, each.netns
        uid, cookie = pod.uid or "", visit(netns, lambda _: own_cookie())
        with self._turns.of(uid):
            if self._node.capture.whose(cookie) != uid:
                if pod.is_deleted or cookie in self._ended:  # its DEL has come already, or comes soon
                    return
                policy = ambient_policy_of(pod, self._node.policy)
                self._node.capture.admit(pod, lambda known: known or self._node.identity(each), policy, netns)
                log.info("pod.joined", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie)
            if self.zds.holds(uid) != cookie:
                if away:
                    raise ZtunnelAway(away)
                self.zds.add(_workload(pod), netns, cookie)
                self._node.capture.accepted(cookie)
            self._redirection.enabled(pod)

    def _note_failure(self, pod: Pod, error: SidestepError, is_patient: bool = True) -> None:
        uid = pod.uid or ""
        seconds = self._attempts.failed(uid, str(error))
        is_enabled = pod.annotations.get(ANNOTATION) == "enabled"
        patience = _ENABLED_AWAY_SECONDS if is_enabled else _AWAY_SECONDS
        if is_patient and isinstance(error, ZtunnelAway) and seconds < patience:
            return
        try:
            self._redirection.pending(pod, error)
        except SidestepError as refused:
            log.warning("annotation.not_written", pod=f"{pod.namespace}/{pod.name}", error=str(refused))

    def _snapshot(self) -> Generator[Held, None, None]:
        """All captured pods, for a ztunnel that has just connected. Those whose namespace is not found are kept."""
        listed = {pod.uid: pod for pod in self._node.pods.every() or () if pod.uid}
        enrolled = self._node.capture.enrolled()
        sandboxes = Counter(enrolled.values())
        sure = {cookie: uid for cookie, uid in enrolled.items() if uid in listed and sandboxes[uid] == 1}
        left = dict.fromkeys(enrolled.values())
        with self._node.find_netns(sure) as found:
            for cookie, netns in found:
                left.pop(sure[cookie], None)
                yield Held(_workload(listed[sure[cookie]]), netns, cookie)
        for uid in left:
            yield Held(_workload(listed[uid]) if uid in listed else Workload(uid, "", "", ""))


def _workload(pod: Pod) -> Workload:
    return Workload(pod.uid or "", pod.name, pod.namespace, pod.spec.service_account_name)


def _what_counts(pod: Pod) -> tuple[object, ...]:
    marks = pod.annotations.get(ANNOTATION), STATUS in pod.annotations
    return pod.labels, pod.status.phase, pod.status.pod_ip, pod.is_deleted, marks
