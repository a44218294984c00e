"""What the maps and links say against what there is: at start, every few minutes, and when the Pods are known again.

Each round first puts back what somebody has taken from the kernel half, then lets go of what is gone, then enrols
running mesh pods that are not, and last compares addresses. It is Istio's repair of pods that started without capture,
and does not wait for their validation to fail.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from bpf.attachment import Outcome, attach, is_attached
from bpf.errors import SidestepError
from bpf.pins import Pins
from bpf.restoration import repin_maps
from bpf.tables import Tables
from cni.adoption import Adoption
from cni.enroll import Enrolments
from cni.follow import Follower
from cni.membership import skip_reason, skip_unseen
from cni.namespaces import find
from cni.pod import Pod, PodEvents, PodSource
from installer.settings import Node

log = structlog.get_logger("reconcile")

# rounds that begin at the same time on many nodes would ask the API server in step
_JITTER = 0.1
RESTORED, STEERED, RECLAIMED, ADOPTED, REFUSED = "restored", "steered", "reclaimed", "adopted", "refused"


@dataclass(frozen=True)
class Place:
    """Where the programs are, and the open tables."""

    pins: Pins
    cgroup: Path
    tables: Tables


@dataclass
class Reconciler:
    """Rounds over one node's pods; once() may be called from any thread, one round runs at a time."""

    place: Place
    node: Node
    pods: PodSource
    enrolments: Enrolments
    follower: Follower
    adoption: Adoption
    events: PodEvents
    observe: Callable[[str, int], None]  # told of each kind of thing that was done, and how many
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _wake: threading.Event = field(default_factory=threading.Event)
    _stopping: bool = False
    _refused: dict[str, str] = field(default_factory=dict)  # Pod UID → why, to say it once

    def once(self) -> Counter[str]:
        """One round; returns how many things of each kind had to be done. What fails is logged, and tried again."""
        with self._lock:
            done: Counter[str] = Counter()
            for step in (self._restore, self._steer, self._reclaim, self._adopt):
                try:
                    done.update(step())
                except SidestepError as error:
                    log.error("reconcile.failed", step=step.__name__.strip("_"), error=str(error))
                except Exception:  # one step's bug must neither keep the others from their work nor end the agent
                    log.exception("reconcile.failed", step=step.__name__.strip("_"))
            self.follower.look_at_all()
            for kind, count in done.items():
                self.observe(kind, count)
            return done

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """A Pod is new or has changed: one that runs without having been enrolled needs a round now."""
        if after is None or not self._belongs(after) or after.uid in self._refused:
            return
        if all(identity.uid != after.uid for identity in self.enrolments.identities().values()):
            self.wake()

    def wake(self) -> None:
        """Make the next round happen now; callable from any thread."""
        self._wake.set()

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """A round about every `seconds`, in a thread of its own."""
        thread = threading.Thread(target=self._run, args=(seconds,), name="reconcile")
        thread.start()
        try:
            yield
        finally:
            self._stopping = True
            self.wake()
            thread.join()

    def _run(self, seconds: float) -> None:
        while True:
            self._wake.wait(seconds * random.uniform(1 - _JITTER, 1 + _JITTER))
            self._wake.clear()
            if self._stopping:
                return
            try:
                self.once()
            except Exception:
                log.exception("reconcile.failed")

    def _restore(self) -> dict[str, int]:
        """Links that were detached and pins that were deleted."""
        place = self.place
        pinned = repin_maps(place.pins, place.tables.descriptors())
        if pinned:
            log.warning("pins.restored", maps=" ".join(pinned), reason="somebody has removed them")
        if is_attached(place.pins):
            return {RESTORED: len(pinned)} if pinned else {}
        outcome = attach(place.pins, place.cgroup)
        log.warning(
            "programs.restored", outcome=str(outcome), cgroup=str(place.cgroup), reason="a link or pin was gone"
        )
        return {RESTORED: len(pinned) + (outcome is not Outcome.UNCHANGED)}

    def _steer(self) -> dict[str, int]:
        """Pods that live but have lost their inbound steering; those that are dead are not found."""
        lost = self.enrolments.unsteered()
        if not lost:
            return {}
        count = 0
        with find(lost, proc=self.node.proc) as found:
            for cookie, netns in found:
                count += self.enrolments.steer(cookie, netns)
                log.warning("steering.restored", netns_cookie=cookie, reason="somebody has removed its link")
        return {STEERED: count} if count else {}

    def _reclaim(self) -> dict[str, int]:
        gone = self.enrolments.reclaim()
        for identity in gone:
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        return {RECLAIMED: len(gone)} if gone else {}

    def _adopt(self) -> Counter[str]:
        """Mesh pods that run and are not enrolled."""
        done: Counter[str] = Counter()
        # Pods first: one that is enrolled in between is then on both lists, instead of on the first alone
        pods = self.pods.every()
        if pods is None:
            return done
        enrolled = {identity.uid for identity in self.enrolments.identities().values()}
        missing = [pod for pod in pods if pod.uid not in enrolled and self._belongs(pod)]
        for outcome in self.adoption.adopt(missing):
            done[REFUSED if outcome.problem else ADOPTED] += 1
            self._tell(outcome.pod, outcome.problem)
        self._forget_refusals(missing)
        return done

    def _belongs(self, pod: Pod) -> bool:
        node = self.node
        if not pod.is_running or pod.spec.host_network:
            return False
        unseen = skip_unseen(pod.namespace, pod.name, node.pod_namespace, node.exclude_namespaces)
        return unseen is None and skip_reason(pod) is None

    def _tell(self, pod: Pod, problem: str) -> None:
        name, uid = f"{pod.namespace}/{pod.name}", pod.uid or ""
        if not problem:
            self.events.normal(pod, "CaptureRepaired", "enrolled while running: new connections are captured")
        elif self._refused.get(uid) != problem:
            self._refused[uid] = problem
            log.error("pod.not_adopted", pod=name, problem=problem)
            self.events.warning(pod, "CaptureRefused", problem)

    def _forget_refusals(self, missing: Collection[Pod]) -> None:
        uids = {pod.uid for pod in missing}
        self._refused = {uid: why for uid, why in self._refused.items() if uid in uids}
