"""Looks where the processes of enrolled pods run, and has somebody do something about those that run elsewhere.

If a stray process is in a cgroup of its own pod, the programs are attached there as well. Any other stray process was
put into the pod's namespace by somebody (nsenter), or was moved out of the pod's cgroups. Nothing can capture it, so
the log and the pod's owner are told.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from bpf.errors import SidestepError
from bpf.pins import Pins
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity
from cni.enrolment.refusals import for_owners
from cni.enrolment.strays import PodProcesses, Stray, processes_of, told_of
from cni.policy.pod import Pod, PodEvents

log = structlog.get_logger("strays")

# A pod's containers start after its ADD: seconds for which its processes are looked at often.
_YOUNG = 60.0


@dataclass
class Strays:
    """Looks at all pods with one walk of /proc. Not safe to use from several threads."""

    pins: Pins
    enrolments: Enrolments
    proc: Path
    pods_of: Callable[[Iterable[int]], Mapping[int, Pod]]  # the Pods of enrolled cookies
    events: PodEvents
    learned: Callable[[int], None]  # gets the cookie of a pod whose proxy the programs see from now on
    cover: Callable[[Path], bool]  # attaches where a pod's cgroup is below; True if that took something
    _young: dict[int, float] = field(default_factory=dict)  # cookie → time until which the pod is looked at often
    _seen: dict[int, set[Stray]] = field(default_factory=dict)  # the stray processes of the last look
    _told: dict[int, set[tuple[str, str]]] = field(default_factory=dict)  # names and cgroups that were reported
    _unknown: str = ""  # why the last look could not see everything

    def look_for_strays(self) -> Mapping[str, int]:
        """Look at every pod. A process is told of when it is seen twice: runtimes start some in a pod, then move them.

        Returns nothing to count.
        """
        self._note_age()
        processes = processes_of(self.pins, self.enrolments.cookies(), self.proc)
        self._tell_unknown(processes.values())
        astray = {cookie: each for cookie, each in processes.items() if each.strays}
        pods, identities = self.pods_of(astray) if astray else {}, self.enrolments.identities()
        for cookie, each in astray.items():
            if cookie in identities:
                self._handle(cookie, each.strays, identities[cookie], pods.get(cookie))
        self._seen = {cookie: set(each.strays) for cookie, each in astray.items()}
        return {}

    def look_for_strays_soon(self) -> Mapping[str, int]:
        """The same, but only if a pod is young, or if a stray process has been seen once."""
        self._note_age()
        is_doubtful = any(
            (each.name, each.cgroup) not in self._told.get(cookie, ())
            for cookie, strays in self._seen.items()
            for each in strays
        )
        is_any_young = any(until > time.monotonic() for until in self._young.values())
        return self.look_for_strays() if is_doubtful or is_any_young else {}

    def _note_age(self) -> None:
        cookies, until = self.enrolments.cookies(), time.monotonic() + _YOUNG
        self._young = {cookie: self._young.get(cookie, until) for cookie in cookies}
        self._told = {cookie: self._told[cookie] for cookie in cookies if cookie in self._told}

    def _handle(self, cookie: int, strays: Collection[Stray], identity: Identity, pod: Pod | None) -> None:
        problem = ""
        for cgroup in {each.cgroup: each.directory() for each in strays if _is_own(each, identity, pod)}.values():
            try:
                if self.cover(cgroup):
                    self.learned(cookie)
                    return
            except SidestepError as error:
                problem = for_owners(error)
                log.error("programs.not_extended", cgroup=str(cgroup), error=str(error))
        told = self._told.setdefault(cookie, set())
        fresh = [each for each in strays if (each.name, each.cgroup) not in told and each in self._seen.get(cookie, ())]
        if fresh:
            told |= {(each.name, each.cgroup) for each in fresh}
            self._tell(fresh, identity, pod, problem)

    def _tell(self, strays: list[Stray], identity: Identity, pod: Pod | None, problem: str) -> None:
        for each in strays:
            log.warning("process.not_captured", pod=str(identity), **each._asdict(), reason=problem or "stray process")
        if pod:
            why = f"; the programs can't be attached there: {problem}" if problem else ""
            self.events.warning(pod, "NotCaptured", told_of(strays) + why)

    def _tell_unknown(self, processes: Iterable[PodProcesses]) -> None:
        unknown = next((each.unknown for each in processes if each.unknown), "")
        if unknown and not self._unknown:
            log.error("processes.unknown", reason=unknown)
        self._unknown = unknown


def _is_own(stray: Stray, identity: Identity, pod: Pod | None) -> bool:
    """Whether the path of a process's cgroup names the process's pod, as kubelet's and the runtime's cgroups do.

    With the driver systemd, a pod's UID has underscores for hyphens.
    """
    names = identity.uid, identity.uid.replace("-", "_"), identity.container_id, *(pod.container_ids if pod else ())
    return any(name in stray.cgroup for name in names if name)
