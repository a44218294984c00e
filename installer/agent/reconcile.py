"""Compares maps and links with the node's pods, and puts right what differs.

A round puts back detached links and missing pins, lets go of pods whose namespace is gone, enrols running mesh pods
that are not enrolled, registers listeners that the programs missed, restores missing map entries, compares every pod
with its namespace, follows changed annotations, and looks where pods' processes run. Rounds run at the start and every
few minutes. Programs that are detached capture nothing, so links, pins, lost namespaces and closed listeners are
checked every few seconds. wake() has them checked at once, and running mesh pods enrolled.

Istio's repair controller also handles pods that started without capture, but only after their validation has failed.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import structlog

from bpf.attachment import Outcome, is_attached, repin_maps, unpin_others
from bpf.errors import SidestepError
from bpf.layout import LISTENER_SLOTS, PodFlags
from bpf.pins import Pins
from bpf.retained import Retained
from bpf.tables import Tables
from cni.enrolment.admission import Policy
from cni.enrolment.adoption import Adopted, Adoption
from cni.enrolment.ambient import ambient_policy_of_flags
from cni.enrolment.bystanders import (
    BOTH,
    BY_NOBODY,
    WATCHED,
    bystanders,
    captured_by_nobody,
    captured_twice,
    key_of,
)
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity
from cni.enrolment.failures import Failures
from cni.enrolment.follow import Follower
from cni.enrolment.left_out import LeftOut
from cni.enrolment.refusals import Refusals
from cni.netns.namespaces import find_netns
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod, PodEvents, PodSource
from installer.agent.places import Places
from installer.settings import Node

log = structlog.get_logger("reconcile")

# each pause varies by this share, so that many nodes do not ask the API server at the same moment
_JITTER = 0.1
# seconds between checks of programs, links and pins; a check takes about 3 ms with 250 pods
_LOOK_SECONDS = 5.0
# the proxy of an adopted pod may begin to listen a little later: seconds between checks for that, and seconds until
# only the rounds check
_LISTEN_SECONDS, _LISTEN_FOR = 1.0, 60.0
# seconds between two looks for the rules of shadow pods
_SHADOW_SECONDS = 15.0
RESTORED, STEERED, RECLAIMED, ADOPTED, REFUSED = "restored", "steered", "reclaimed", "adopted", "refused"
HEARD, MENDED = "heard", "mended"

Done = Mapping[str, int]


def _no_cookie(_: int) -> bool:
    return False


def _never(_: Pod) -> bool:
    return False


def no_ambient_policy(_: Pod) -> AmbientPolicy | None:
    """For a node without ambient mode."""
    return None


def _nothing() -> None:
    pass


def nothing_done() -> Done:
    """For a step that the node does not need."""
    return {}


@dataclass(frozen=True)
class NodeTables:
    """Where the programs are pinned and attached, and their open tables."""

    pins: Pins
    places: Places
    tables: Tables


@dataclass
class Reconciler:
    """Runs the rounds for one node. Any thread may call once(), look() and wake(); one round runs at a time."""

    place: NodeTables
    node: Node
    pods: PodSource
    enrolments: Enrolments
    follower: Follower
    adoption: Adoption
    events: PodEvents
    observe: Callable[[str, int], None]  # gets the kind of each thing put right, and the count
    claims: Callable[[Pod], bool] = _never  # whether Repairs will delete or label the pod
    follow: Callable[[], None] = _nothing  # has running pods follow what their annotations say now
    hold: Callable[[], None] = _nothing  # keeps other agents from the pins
    retained: Retained | None = None  # what is pinned, also open in this process
    take_over: Callable[[], Done] = nothing_done  # takes pods over from another layout of the maps
    left_out: LeftOut = field(default_factory=LeftOut)  # tells of pods that are not captured
    refusals: Refusals = field(default_factory=Refusals)  # remembers the pods that were refused
    is_exchanging: Callable[[int], bool] = _no_cookie  # whether a pod is between Istio's rules and capture now
    was_broken: Callable[[Pod], bool] = _never  # whether the pod's validation has failed for want of capture
    failures: Failures | None = None  # remembers the connections that were refused
    strays: Callable[[], Done] = nothing_done  # looks where the processes of pods run
    # what is captured of a Pod in ambient mode; None if it is not in it; raises SidestepError
    ambient_policy: Callable[[Pod], AmbientPolicy | None] = no_ambient_policy
    probes: Callable[[], Done] = nothing_done  # has kubelet's probes reach pods in ambient mode
    strays_soon: Callable[[], Done] = nothing_done  # the same, but only if there is reason to
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _wake: threading.Event = field(default_factory=threading.Event)
    _stopping: bool = False
    _told: dict[str, str] = field(default_factory=dict)  # Pod UID → why it is not enrolled, reported once
    _twice: set[int] = field(default_factory=set)  # cookies of pods that Istio's rules capture too
    _bare: set[int] = field(default_factory=set)  # cookies of shadow pods whose rules had gone at the last look
    _next_shadows: float = 0.0
    _expected: dict[int, float] = field(default_factory=dict)  # cookie whose proxy may soon listen → deadline
    _slots: dict[int, set[int]] = field(default_factory=dict)  # cookie → slots with listeners, at the last look
    _learned: SimpleQueue[int] = field(default_factory=SimpleQueue)  # cookies of proxies that something is new about
    _strangers: Counter[int] = field(default_factory=Counter)  # cookie of an enrolled pod not listed → times seen

    def once(self) -> Counter[str]:
        """Run one round; returns a count for each kind of thing put right.

        A step that fails is logged and runs again in the next round.
        """
        begin, end = (
            (self._restore, self._take),
            (self._listen, self._mend, self._compare, self._follow, self._see_rules),
        )
        last = (self.strays, self.probes, self._note_failures, self._settle)
        return self._do(*begin, self._sweep, self._adopt, self._take, *end, *last)

    def look(self) -> Counter[str]:
        """Run only the steps that cannot wait for the next round."""
        begin, last = (self._restore, self._take, self._sweep), (self.probes, self._note_failures, self._settle)
        return self._do(*begin, self._listen_soon, self._see_shadows, self.strays_soon, *last)

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """Handle a new or changed Pod: if it runs without being enrolled, wake the rounds."""
        if after is not None:
            self._mention([after])
        if after is None or not self._belongs(after) or after.uid in self._told:
            return
        if not self.is_enrolled(after):
            self.wake()

    def is_enrolled(self, pod: Pod) -> bool:
        """Whether this Pod is in the maps: by its UID, or by its name if it has no UID."""
        return _key(pod) in {_key(identity) for identity in self.enrolments.identities().values()}

    def learned(self, cookie: int) -> None:
        """Look for a pod's listeners now, because something is known of its proxy that was not; from any thread."""
        self._learned.put(cookie)
        self.wake()

    def wake(self) -> None:
        """Look for pods to enrol now; callable from any thread."""
        self._wake.set()

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """Run a round about every `seconds`, in a thread, until the context ends."""
        thread = threading.Thread(target=self._run, args=(seconds,), name="reconcile")
        thread.start()
        try:
            yield
        finally:
            self._stopping = True
            self.wake()
            thread.join()

    def _run(self, seconds: float) -> None:
        due = _jittered(seconds)
        while True:
            pause = _LISTEN_SECONDS if self._expected else _LOOK_SECONDS
            woken = self._wake.wait(max(0.0, min(pause, due - time.monotonic())))
            self._wake.clear()
            if self._stopping:
                self._do(self._leave)
                return
            if time.monotonic() >= due:
                self.once()
                due = _jittered(seconds)
            elif woken:
                soon = (self._take, self._listen_soon, self.strays_soon)
                self._do(self._restore, self._take, self._sweep, self._adopt, *soon)
            else:
                self.look()

    def _do(self, *steps: Callable[[], Done]) -> Counter[str]:
        with self._lock:
            done: Counter[str] = Counter()
            for step in steps:
                try:
                    done.update(step())
                except SidestepError as error:
                    log.error("reconcile.failed", step=step.__name__.strip("_"), error=str(error))
                except Exception:  # a bug in one step must stop neither the other steps nor the agent
                    log.exception("reconcile.failed", step=step.__name__.strip("_"))
            for kind, count in done.items():
                self.observe(kind, count)
            return done

    def _restore(self) -> Done:
        """Put back links that were detached and pins that were deleted.

        What this process has open is only pinned again. Pins of maps that are not the agent's are replaced then.
        Attaching loads programs for the agent's maps.
        """
        self.hold()
        put_back = self._put_back()
        done = self._attach_again()
        if self.retained:
            self.retained.look()
        restored = len(put_back) + done
        return {RESTORED: restored} if restored else {}

    def _leave(self) -> Done:
        """Pin again what somebody has just removed: when this process ends, the pins alone hold it."""
        put_back = self._put_back()
        return {RESTORED: len(put_back)} if put_back else {}

    def _put_back(self) -> list[str]:
        """Pin again what this process has open."""
        if self.retained is None:
            return []
        put_back = self.retained.restore()
        put_back += [f"netns/{cookie}" for cookie in self.enrolments.restore_links()]
        if put_back:
            log.warning("pins.restored", pins=" ".join(put_back), reason="somebody has removed them")
        return put_back

    def _attach_again(self) -> int:
        """Attach what is not attached. Returns how many things that took."""
        place = self.place
        held = place.tables.descriptors()
        foreign = unpin_others(place.pins, held)
        if foreign:
            log.warning("pins.foreign", maps=" ".join(foreign), reason="somebody else has attached the programs anew")
        pinned = repin_maps(place.pins, held)
        if pinned:
            log.warning("pins.restored", maps=" ".join(pinned), reason="somebody has removed them")
        if not foreign and is_attached(place.pins) and not place.places.are_lost():
            return len(pinned)
        outcome = place.places.attach()
        cgroups = " ".join(map(str, place.places.every()))
        log.warning("programs.restored", outcome=str(outcome), cgroups=cgroups, reason="a link or pin was gone")
        # proxies that were bound meanwhile are not known to the programs
        self._expected = dict.fromkeys(self.enrolments.cookies(), time.monotonic() + _LISTEN_FOR)
        return len(pinned) + (outcome is not Outcome.UNCHANGED)

    def _take(self) -> Done:
        """Take pods over from another layout. Before _sweep(), as that layout still steers them."""
        return self.take_over()

    def _sweep(self) -> Done:
        """Let go of pods whose namespace is gone; put back the inbound steering of live pods that lost it."""
        swept = self.follower.sweep()
        pods = self.pods_of(swept.steered) if swept.steered else {}
        for cookie in swept.steered:
            log.warning("steering.restored", netns_cookie=cookie, reason="somebody has removed the pod's link")
            self._tell_repaired(pods.get(cookie), "inbound capture is restored: somebody had removed its link")
        for identity in swept.gone:
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        counts = {STEERED: len(swept.steered), RECLAIMED: len(swept.gone)}
        return {kind: count for kind, count in counts.items() if count}

    def _adopt(self) -> Done:
        """Enrol mesh pods that run and are not enrolled."""
        done: Counter[str] = Counter()
        # read the Pods before the enrolments: if an ADD enrols a pod in between, the pod does not look unenrolled
        pods = self.pods.every()
        if pods is None:
            return done
        identities = self.enrolments.identities()
        enrolled = {_key(identity) for identity in identities.values()}
        missing = [pod for pod in pods if _key(pod) not in enrolled and self._belongs(pod) and not self.claims(pod)]
        for outcome in self.adoption.adopt(missing):
            self._tell(outcome)
            if outcome.problem:
                done[REFUSED] += 1
            elif not outcome.left_alone:
                done[ADOPTED] += 1
                if not outcome.listeners and not outcome.is_shadow:
                    self._expected[outcome.cookie] = time.monotonic() + _LISTEN_FOR
        uids = {pod.uid for pod in missing}
        self._told = {uid: why for uid, why in self._told.items() if uid in uids}
        self._mention(pods)
        self.left_out.keep_listed(pods)
        self.refusals.keep_listed(pods)
        self._mention_strangers(identities, {_key(pod) for pod in pods})
        return done

    def _listen(self) -> Done:
        """Register the listeners of proxies that listen without the programs knowing it."""
        slots = self.enrolments.slots()
        return self._register(
            cookie for cookie in self.enrolments.cookies() if len(slots.get(cookie, ())) < LISTENER_SLOTS
        )

    def _listen_soon(self) -> Done:
        """Register listeners as _listen() does, but only where there is reason to think that some are missing.

        That is: of pods that were adopted a moment ago, of proxies that something new is known about, and where
        listeners have gone. The listeners that are left may be those of a proxy that is about to be replaced.
        """
        now, slots = time.monotonic(), self.enrolments.slots()
        self._expected = {
            cookie: until for cookie, until in self._expected.items() if until > now and cookie not in slots
        }
        wanted = {cookie for cookie, before in self._slots.items() if before - slots.get(cookie, set())}
        while not self._learned.empty():
            cookie = self._learned.get()
            wanted.add(cookie)
            if cookie not in slots:
                self._expected[cookie] = now + _LISTEN_FOR
        self._slots = slots
        return self._register({*wanted, *self._expected})

    def _register(self, cookies: Iterable[int]) -> Done:
        inodes = self.enrolments.inodes(set(cookies))
        count = self.adoption.listen(inodes, self.pods_of(inodes)) if inodes else 0
        if count:
            log.info("listeners.found", listeners=count)
        return {HEARD: count} if count else {}

    def _mend(self) -> Done:
        """Restore entries that somebody has removed from the maps."""
        damaged = self.enrolments.damaged()
        if not damaged:
            return {}
        pods, count = self.pods_of(damaged), 0
        with find_netns(damaged, proc=self.node.proc) as found:
            for cookie, netns in found:
                if cookie in pods and self._restore_entries(cookie, damaged[cookie], pods[cookie], netns):
                    count += 1
        return {MENDED: count} if count else {}

    def _restore_entries(self, cookie: int, identity: Identity, pod: Pod, netns: int) -> bool:
        """Enrol a pod again. If what it asks for by now is refused, it keeps what is left."""
        admission = self.adoption.admission
        try:
            policy = self._policy_of(cookie, pod)
            admission.admit_as(identity, policy, netns)
        except SidestepError as error:
            log.error("entries.not_restored", pod=str(identity), error=str(error))
            return False
        log.warning("entries.restored", pod=str(identity), reason="somebody has removed entries")
        self._tell_repaired(pod, "map entries are restored: somebody had removed some")
        return True

    def _policy_of(self, cookie: int, pod: Pod) -> Policy:
        """What an enrolled pod's entries have to say. Raises SidestepError."""
        entry = self.enrolments.entry(cookie)
        if entry and PodFlags.AMBIENT in PodFlags(entry.flags):
            return ambient_policy_of_flags(PodFlags(entry.flags))
        ambient = None if entry else self.ambient_policy(pod)
        return ambient or self.adoption.admission.policies.of_enrolled(pod, self.enrolments.on_uncaptured(cookie))

    def _mention(self, pods: Iterable[Pod]) -> None:
        """Tell of running pods that have a sidecar and are left out: each once for the same reason."""
        identities = self.enrolments.identities().values()
        enrolled = {_key(identity) for identity in identities}
        for pod, reason in bystanders(pods, enrolled, self.node.pod_namespace, self.node.exclude_namespaces):
            if reason:
                self.left_out.is_running(pod, reason)

    def _see_rules(self) -> Done:
        """Look for Istio's rules in enrolled pods: istio-cni may come after sidestep in the chain."""
        shadows = set(self.enrolments.shadows())
        found = captured_twice(set(self.enrolments.cookies()) - shadows, self.node.proc)
        twice = {cookie for cookie in found if not self.is_exchanging(cookie)}
        pods = self.pods_of(twice - self._twice)
        for cookie in twice - self._twice:
            log.error("pod.captured_twice", netns_cookie=cookie, pod=str(self.enrolments.identities().get(cookie)))
            if cookie in pods:
                self.events.warning(pods[cookie], "CapturedTwice", BOTH)
        self._twice = twice
        return {}

    def _see_shadows(self) -> Done:
        """Look whether the shadow pods still have Istio's rules. One that has none twice in a row is enrolled anew.

        Once would not be enough: somebody may be about to exchange rules for capture, or the other way round.
        """
        if time.monotonic() < self._next_shadows:
            return {}
        self._next_shadows = time.monotonic() + _SHADOW_SECONDS
        bare = captured_by_nobody(self.enrolments.shadows(), self.node.proc)
        pods, surely = self.pods_of(bare), bare & self._bare
        self._bare = bare - surely
        for cookie in surely:
            log.error("shadow.rules_gone", pod=str(self.enrolments.identities().get(cookie)), netns_cookie=cookie)
            if cookie in pods:
                self.events.warning(pods[cookie], "CapturedByNobody", BY_NOBODY)
            self.let_go(cookie)
        return self._adopt() if surely else {}

    def let_go(self, cookie: int) -> None:
        """Take a shadow pod out: netfilter goes on as before."""
        self.follower.forget(cookie)
        self.enrolments.remove(cookie)

    def _compare(self) -> Done:
        self.follower.look_at_all()
        return {}

    def _note_failures(self) -> Done:
        """Note which pods' connections were refused or denied since the last look."""
        if self.failures:
            self.failures.look(self.enrolments.identities())
        return {}

    def _settle(self) -> Done:
        """Remove the rows of policies that are not in force any more."""
        self.enrolments.settle()
        return {}

    def _follow(self) -> Done:
        """Apply changes of annotations that the watch missed or that found no room in the maps."""
        self.follow()
        return {}

    def pods_of(self, cookies: Iterable[int]) -> dict[int, Pod]:
        """The Pods of enrolled cookies, without those that are not known."""
        by_key = {_key(pod): pod for pod in self.pods.every() or ()}
        identities = self.enrolments.identities()
        keys = {cookie: _key(identities[cookie]) for cookie in cookies if cookie in identities}
        return {cookie: by_key[key] for cookie, key in keys.items() if key in by_key}

    def _mention_strangers(self, identities: Mapping[int, Identity], listed: Collection[str]) -> None:
        """Log each enrolled pod that is not listed, once.

        It stays enrolled as long as its namespace lives: a DEL may be under way.
        """
        strangers = [cookie for cookie, identity in identities.items() if _key(identity) not in listed]
        self._strangers = Counter({cookie: self._strangers[cookie] + 1 for cookie in strangers})
        for cookie in strangers:
            if self._strangers[cookie] == 2:  # the first time, the list may be older than the pod's ADD
                log.info("pod.not_listed", pod=str(identities[cookie]), netns_cookie=cookie)

    def _belongs(self, pod: Pod) -> bool:
        return pod.is_running and skip_pod(pod, self.node.pod_namespace, self.node.exclude_namespaces) is None

    def _tell_repaired(self, pod: Pod | None, message: str) -> None:
        """Tell the pod's owner in an Event, if the Pod is known. Repetitions are counted in the same Event."""
        if pod is not None:
            self.events.normal(pod, "CaptureRepaired", message)

    def _tell_adopted(self, pod: Pod) -> None:
        """Tell the owner of a pod that was enrolled while it ran: only a broken pod was repaired."""
        if self.was_broken(pod):
            self.events.normal(pod, "CaptureRepaired", "enrolled while running: its validation passes on retry")
        else:
            self.events.normal(pod, "CaptureFound", "found running: its new connections are captured from now on")

    def _tell(self, outcome: Adopted) -> None:
        pod, name, uid = outcome.pod, f"{outcome.pod.namespace}/{outcome.pod.name}", outcome.pod.uid or ""
        why = outcome.problem or outcome.left_alone
        if not why:
            self.refusals.forget(pod.namespace, pod.name)
            if outcome.is_shadow:
                self.events.normal(pod, "ShadowFound", WATCHED)
            else:
                self._tell_adopted(pod)
        elif self._told.get(uid) != why:
            self._told[uid] = why
            if outcome.problem:
                log.error("pod.not_adopted", pod=name, problem=str(outcome.error or why))
                self.refusals.refuse(pod.namespace, pod.name, outcome.error or SidestepError(why))
                self.events.warning(pod, "CaptureRefused", why)
            else:
                log.info("pod.left_alone", pod=name, reason=why)
                self.events.normal(pod, "NotCaptured", f"sidestep does not capture this pod: {why}")


def _key(of: Pod | Identity) -> str:
    """The key that a Pod shares with its entry in the maps: the UID, or namespace and name if the Pod has no UID."""
    return key_of(of.uid, of.namespace, of.name)


def _jittered(seconds: float) -> float:
    return time.monotonic() + seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
