"""The kernel's half of ambient mode, as members.py needs it."""

from collections.abc import Callable
from dataclasses import dataclass

from bpf.layout import PodFlags
from cni.enrolment.admission import Admission
from cni.enrolment.entries import Identity
from cni.errors import DETACHED, NotCaptured
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.pod import Pod


@dataclass(frozen=True)
class KernelCapture:
    """Capture by sidestep's programs. `learned` has a pod's listeners looked for, by the cookie of its namespace."""

    admission: Admission
    learned: Callable[[int], None]

    def admit(
        self, pod: Pod, identify: Callable[[Identity | None], Identity], policy: AmbientPolicy, netns: int
    ) -> int:
        """Capture a namespace, given by a descriptor. Returns its cookie.

        Raises SandboxInvalid, RegistrationFailed, and NotCaptured if the programs are not attached; the maps are then
        as before.
        """
        admitted = self.admission.admit(identify, policy, netns)
        if not self.admission.enrolments.is_captured(admitted.cookie):
            if admitted.before is None:
                self.admission.release(admitted.cookie)
            raise NotCaptured(f"{pod.namespace}/{pod.name} would run uncaptured: {DETACHED}")
        return admitted.cookie

    def leave(self, cookie: int) -> None:
        """End capture of a namespace. Open connections go on."""
        self.admission.release(cookie)

    def accepted(self, cookie: int) -> None:
        """Look for listeners that ztunnel has had before: the programs have seen only those that came later."""
        self.learned(cookie)

    def whose(self, cookie: int) -> str | None:
        """The UID of the pod whose namespace it is, if that is captured for ztunnel; otherwise None."""
        entry = self.admission.enrolments.entry(cookie)
        return Identity.of(entry).uid if entry and PodFlags.AMBIENT in PodFlags(entry.flags) else None

    def enrolled(self) -> dict[int, str]:
        """The UIDs of the pods that are captured for ztunnel, by the cookies of their namespaces."""
        found = {cookie: self.whose(cookie) for cookie in self.admission.enrolments.cookies()}
        return {cookie: uid for cookie, uid in found.items() if uid is not None}
