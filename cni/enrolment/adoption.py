"""Adopts running pods: those created before the plugin was in the chain, or while something kept it from working.

No CNI call announces these pods, so they are found through the network namespaces of their processes. The programs did
not see their proxies begin to listen, so hearing.py registers the listening sockets. Open connections stay as they are;
new ones are captured.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from bpf.errors import KernelRefused, SidestepError
from bpf.layout import PodFlags
from bpf.syscalls import Descriptor
from cni.enrolment.admission import Admission
from cni.enrolment.bystanders import RUNNING_WITH_RULES
from cni.enrolment.entries import Identity
from cni.enrolment.hearing import Hearing
from cni.enrolment.refusals import for_owners
from cni.enrolment.whose_netns import inhabited
from cni.errors import SandboxInvalid
from cni.netns.listeners import Proxy, Ztunnel
from cni.netns.namespaces import find_netns
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.pidfd import sees_nodes_pids
from cni.netns.processes import Crowd, crowds, netns_of_crowd
from cni.netns.sandbox import own_cookie, visit
from cni.netns.userns import outside_ids
from cni.policy.annotations import CapturePolicy, OnUncaptured
from cni.policy.pod import Pod

log = structlog.get_logger("adoption")

# the proxy would get no connection any more: the programs give inbound connections only to listeners that they know
_CANNOT_HEAR = (
    "its proxy's listening sockets can't be taken over: this kernel does not take the iterator over sockets, and the "
    "agent does not see the node's process ids. Set hostPID: true for the agent, or create the pod anew"
)
# of pods for which it counts whether their proxy has ever listened for outbound connections
_NEEDS_START = PodFlags.EARLY_OUTBOUND | PodFlags.LATE_OUTBOUND
_IFNAME = "eth0"  # the name that runtimes give a pod's first interface


@dataclass(frozen=True)
class Adopted:
    """The outcome for one pod. It is enrolled, unless `problem` or `left_alone` says why not.

    `error` is the error behind a problem, as the log has it; `problem` is for the pod's owner.
    `listeners` is the number of its proxy's listening sockets that were registered.
    """

    pod: Pod
    problem: str = ""
    left_alone: str = ""
    cookie: int = 0
    listeners: int = 0
    is_shadow: bool = False  # Istio's rules capture it
    error: SidestepError | None = None

    @classmethod
    def failed(cls, pod: Pod, error: SidestepError) -> "Adopted":
        """The outcome for a pod whose enrolment has failed."""
        return cls(pod, problem=for_owners(error), error=error)


@dataclass(frozen=True)
class Adoption:
    """Finds running pods on the node that `proc` shows, and enrols them."""

    admission: Admission
    hearing: Hearing
    proc: Path = Path("/proc")

    def adopt(self, pods: Collection[Pod], beside_rules: bool = False) -> Iterator[Adopted]:
        """Enrol pods that are not enrolled yet. Yields an outcome for each pod whose namespace was found.

        The namespace of a pod without a process cannot be found. One walk of /proc serves all pods. Pods that Istio's
        rules capture are left alone, unless `beside_rules`.
        """
        for pod, crowd, netns in inhabited(pods, self.proc):
            try:
                yield self._adopt(pod, crowd, netns, beside_rules=beside_rules)
            except SidestepError as error:
                yield Adopted.failed(pod, error)

    def adopt_known(self, pods: Mapping[int, Pod], enrolled: Mapping[int, OnUncaptured]) -> Iterator[Adopted]:
        """The same for pods whose namespaces are known: netns cookie → Pod. A pod needs no process of its own.

        `enrolled` says what each has asked for about what is not captured, in the enrolment that it has elsewhere.
        """
        if not pods:
            return
        around = crowds(self.proc)
        with find_netns(pods, proc=self.proc) as found:
            for cookie, netns in found:
                inode = os.fstat(netns).st_ino
                try:
                    yield self._adopt(pods[cookie], around.get(inode, Crowd(inode)), netns, enrolled.get(cookie))
                except SidestepError as error:
                    yield Adopted.failed(pods[cookie], error)

    @contextmanager
    def namespace_of(self, pod: Pod) -> Iterator[int]:
        """A descriptor of a running pod's network namespace, open meanwhile. Raises SandboxInvalid if it has none."""
        with closing(inhabited([pod], self.proc)) as found:
            found_pod = next(found, None)
            if found_pod is None:
                raise SandboxInvalid(f"no process of {pod.namespace}/{pod.name} runs on this node")
            yield found_pod.netns

    def listen(self, inodes: Mapping[int, int], pods: Mapping[int, Pod]) -> int:
        """Register listeners of enrolled pods that the programs have not seen. Returns how many were registered.

        `inodes` maps netns cookies to the inodes of the namespaces. `pods` has the Pods by netns cookie, as far as they
        are known.
        """
        if not inodes:
            return 0
        count = 0
        try:
            for cookie, netns, pids in self._namespaces(inodes):
                count += self._hear_again(cookie, pods.get(cookie), netns, pids)
        except KernelRefused as error:
            if self.hearing.needs_processes:
                raise
            self.hearing.distrust(error)
            count += self.listen(inodes, pods)
        return count

    def _namespaces(self, inodes: Mapping[int, int]) -> Iterator[tuple[int, int, list[int]]]:
        """Each pod's cookie, a descriptor of its namespace until the next step, and processes if needed."""
        if not self.hearing.needs_processes:
            with find_netns(inodes.keys(), set(inodes.values()), self.proc) as found:
                yield from ((cookie, netns, []) for cookie, netns in found)
            return
        around = crowds(self.proc)
        for cookie, inode in inodes.items():
            crowd = around.get(inode)
            netns = netns_of_crowd(self.proc, crowd) if crowd else None
            if crowd and netns is not None:
                with Descriptor(netns):
                    yield cookie, netns, crowd.pids

    def _hear_again(self, cookie: int, pod: Pod | None, netns: int, pids: list[int]) -> int:
        enrolments = self.admission.enrolments
        entry = enrolments.entry(cookie)
        if entry is None:
            return 0
        flags, ids = PodFlags(entry.flags), (entry.proxy_uid, entry.proxy_gid)
        proxy: Proxy | Ztunnel | None = Proxy(cookie, *ids)
        if PodFlags.AMBIENT in flags:
            proxy = Ztunnel(cookie, None if PodFlags.TRUSTS_MARK in flags else enrolments.ztunnels())
        elif PodFlags.STRICT in flags:
            proxy = _strict_proxy(cookie, ids, enrolments.container(cookie), pod)
        with suppress(SandboxInvalid):  # the namespace has gone meanwhile
            return self.hearing.hear(proxy, netns, pids, bool(flags & _NEEDS_START)) if proxy else 0
        return 0

    def _adopt(
        self, pod: Pod, crowd: Crowd, netns: int, enrolled: OnUncaptured | None = None, beside_rules: bool = False
    ) -> Adopted:
        policies = self.admission.policies
        policy = policies.of(pod) if enrolled is None else policies.of_enrolled(pod, enrolled)
        cookie, is_captured = visit(netns, lambda _: (own_cookie(), is_captured_by_istio()))
        if is_captured and not (beside_rules or self.admission.has_shadows):
            return Adopted(pod, left_alone=RUNNING_WITH_RULES)
        if is_captured and not beside_rules:
            return self._adopt_shadow(pod, crowd, policy, netns, cookie)
        if self.hearing.needs_processes and not self._can_copy_sockets():
            return Adopted(pod, problem=_CANNOT_HEAR)
        ids = outside_ids(netns, policy.proxy_uid, policy.proxy_gid)
        proxy: Proxy | None = Proxy(cookie, *ids)
        if policy.strict_proxy:
            proxy = _strict_proxy(cookie, ids, self.admission.follower.cgroup_of(pod.proxy_container_id or ""), pod)
        # Before the programs see the pod: from then on they refuse captured connections that find no listener.
        count = self._hear(proxy, netns, crowd, False)
        if not self.admission.adopt(self.identity_of(pod, crowd), policy, netns, beside_rules):
            return Adopted(pod, left_alone="it was enrolled meanwhile")
        # And again afterwards, for sockets that have begun to listen in between.
        count += self._hear(proxy, netns, crowd, policy.early_outbound or policy.late_outbound)
        log.info("pod.adopted", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie, listeners=count)
        return Adopted(pod, cookie=cookie, listeners=count)

    def _adopt_shadow(self, pod: Pod, crowd: Crowd, policy: CapturePolicy, netns: int, cookie: int) -> Adopted:
        """Enrol a pod that Istio's rules capture. The listeners that its proxy has already are not needed."""
        if not self.admission.adopt(self.identity_of(pod, crowd), policy, netns):
            return Adopted(pod, left_alone="it was enrolled meanwhile")
        log.info("pod.shadowed", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie)
        return Adopted(pod, cookie=cookie, is_shadow=True)

    def _can_copy_sockets(self) -> bool:
        try:
            return sees_nodes_pids(self.proc)
        except OSError:
            return False

    def identity_of(self, pod: Pod, crowd: Crowd) -> Identity:
        """The identity for an adopted pod.

        A DEL will name the id of the sandbox's own container. That is the oldest container of the crowd, unless the Pod
        lists it as one of its own; then the id stays empty. In that case the DEL finds the pod by its namespace, or the
        pod is removed when the namespace ends. The network stays empty, so that no GC takes the pod for a left-over.
        """
        oldest = crowd.containers[0] if crowd.containers else ""
        sandbox = "" if oldest in pod.container_ids else oldest
        return Identity(pod.uid or "", pod.name, pod.namespace, sandbox, "", _IFNAME)

    def _hear(self, proxy: Proxy | None, netns: int, crowd: Crowd, ends_early_outbound: bool) -> int:
        if proxy is None:
            return 0
        try:
            return self.hearing.hear(proxy, netns, crowd.pids, ends_early_outbound)
        except KernelRefused as error:
            if self.hearing.needs_processes:
                raise
            self.hearing.distrust(error)
            return self.hearing.hear(proxy, netns, crowd.pids, ends_early_outbound)


def _strict_proxy(cookie: int, ids: tuple[int, int], cgroup: int, pod: Pod | None) -> Proxy | None:
    """How to recognise a strict pod's proxy, None if its container is not known yet."""
    container = pod.proxy_container_id if pod else None
    return Proxy(cookie, *ids, cgroup, container) if cgroup and container else None
