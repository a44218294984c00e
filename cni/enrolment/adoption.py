"""Adopts running pods: those created before the plugin was in the chain, or while something kept it from working.

No CNI call announces these pods, so they are found through the network namespaces of their processes. The programs did
not see their proxies begin to listen, so listeners.py fetches the listening sockets. Open connections stay as they are;
new ones are captured.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, PodFlags
from bpf.syscalls import Descriptor
from cni.enrolment.admission import Admission
from cni.enrolment.bystanders import RUNNING_WITH_RULES
from cni.enrolment.entries import Identity
from cni.errors import SandboxInvalid
from cni.netns.listeners import Proxy, listeners_of
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.processes import Crowd, crowds, netns_of_crowd
from cni.netns.sandbox import addresses_in, own_cookie, visit
from cni.netns.userns import outside_ids
from cni.policy.annotations import policy_of
from cni.policy.pod import Pod

log = structlog.get_logger("adoption")

_IFNAME = "eth0"  # the name that runtimes give a pod's first interface


@dataclass(frozen=True)
class Adopted:
    """The outcome for one pod. It is enrolled, unless `problem` or `left_alone` says why not.

    `listeners` is the number of its proxy's listening sockets that were registered.
    """

    pod: Pod
    problem: str = ""
    left_alone: str = ""
    cookie: int = 0
    listeners: int = 0


@dataclass(frozen=True)
class Adoption:
    """Finds running pods on the node that `proc` shows, and enrols them."""

    admission: Admission
    proc: Path = Path("/proc")

    def adopt(self, pods: Collection[Pod]) -> Iterator[Adopted]:
        """Enrol pods that are not enrolled yet. Yields an outcome for each pod whose namespace was found.

        The namespace of a pod without a process cannot be found. One walk of /proc serves all pods.
        """
        if not pods:
            return
        around = list(crowds(self.proc).values())
        for pod, crowd in self._matched(pods, around):
            netns = netns_of_crowd(self.proc, crowd)
            if netns is None:
                continue
            with Descriptor(netns):
                try:
                    yield self._adopt(pod, crowd, netns)
                except SidestepError as error:
                    yield Adopted(pod, problem=str(error))

    def listen(self, unheard: Mapping[int, int], pods: Mapping[int, Pod]) -> int:
        """Register listeners of enrolled pods whose proxy has none so far. Returns how many were registered.

        If a socket was bound before its pod was enrolled and began to listen afterwards, neither the programs nor
        adopt() saw it. `unheard` maps netns cookies to the inodes of the namespaces. `pods` has the Pods by netns
        cookie, as far as they are known.
        """
        if not unheard:
            return 0
        around = crowds(self.proc)
        count = 0
        for cookie, inode in unheard.items():
            entry, crowd = self.admission.enrolments.entry(cookie), around.get(inode)
            if entry and crowd:
                flags = PodFlags(entry.flags)
                proxy = _proxy(cookie, (entry.proxy_uid, entry.proxy_gid), PodFlags.STRICT in flags, pods.get(cookie))
                count += self._register_listeners(proxy, PodFlags.EARLY_OUTBOUND in flags, crowd)
        return count

    def _matched(self, pods: Iterable[Pod], around: list[Crowd]) -> Iterator[tuple[Pod, Crowd]]:
        """Each pod with the crowd of its processes.

        A pod is matched by its UID or a container id in the processes' cgroup paths. Some runtimes show neither there;
        such a pod is matched by its address. If several crowds match, the oldest is the pod's: a namespace that one of
        the pod's containers has made is younger.
        """
        by_name = {each: crowd for crowd in reversed(around) for each in (*crowd.containers, *crowd.pod_uids)}
        left = []
        for pod in pods:
            crowd = next((by_name[each] for each in (pod.uid, *pod.container_ids) if each in by_name), None)
            if crowd:
                yield pod, crowd
            elif pod.status.pod_ip:
                left.append(pod)
        if left:
            by_address = {address: crowd for crowd in reversed(around) for address in self._addresses(crowd)}
            for pod in left:
                if pod.status.pod_ip in by_address:
                    yield pod, by_address[pod.status.pod_ip]

    def _addresses(self, crowd: Crowd) -> list[str]:
        netns = netns_of_crowd(self.proc, crowd)
        if netns is None:
            return []
        with Descriptor(netns), suppress(SandboxInvalid):
            return [str(each.ip) for each in visit(netns, lambda rtnl: list(addresses_in(rtnl)))]
        return []

    def _adopt(self, pod: Pod, crowd: Crowd, netns: int) -> Adopted:
        policy = policy_of(pod)
        cookie, is_captured = visit(netns, lambda _: (own_cookie(), is_captured_by_istio()))
        if is_captured:
            return Adopted(pod, left_alone=RUNNING_WITH_RULES)
        ids = outside_ids(netns, policy.proxy_uid, policy.proxy_gid)
        proxy = _proxy(cookie, ids, policy.strict_proxy, pod)
        # Before the programs see the pod: from then on they refuse captured connections that find no listener.
        count = self._register_listeners(proxy, False, crowd)
        if not self.admission.adopt(self._identity(pod, crowd), policy, netns):
            return Adopted(pod, left_alone="it was enrolled meanwhile")
        # And again afterwards, for sockets that have begun to listen in between.
        count += self._register_listeners(proxy, policy.early_outbound, crowd)
        log.info("pod.adopted", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie, listeners=count)
        return Adopted(pod, cookie=cookie, listeners=count)

    def _identity(self, pod: Pod, crowd: Crowd) -> Identity:
        """The identity for an adopted pod.

        A DEL will name the id of the sandbox's own container. That is the oldest container of the crowd, unless the Pod
        lists it as one of its own; then the id stays empty. In that case the DEL finds the pod by its namespace, or the
        pod is removed when the namespace ends. The network stays empty, so that no GC takes the pod for a left-over.
        """
        oldest = crowd.containers[0] if crowd.containers else ""
        sandbox = "" if oldest in pod.container_ids else oldest
        return Identity(pod.uid or "", pod.name, pod.namespace, sandbox, "", _IFNAME)

    def _register_listeners(self, proxy: Proxy | None, early_outbound: bool, crowd: Crowd) -> int:
        if proxy is None:
            return 0
        enrolments, count = self.admission.enrolments, 0
        for listener in listeners_of(proxy, crowd.pids, self.proc):
            with listener.socket:
                if listener.port == INBOUND_PORT:
                    count += enrolments.add_listener(proxy.cookie, INBOUND_PORT, listener.socket)
                # as in sockops.c: istio-validation listens on this port too, but on 127.0.0.1
                elif listener.port == OUTBOUND_PORT and early_outbound and listener.anywhere:
                    enrolments.has_started(proxy.cookie)
        return count


def _proxy(cookie: int, ids: tuple[int, int], strict: bool, pod: Pod | None) -> Proxy | None:
    """How to recognise a pod's proxy. None for a strict pod whose proxy container is not known yet."""
    if not strict:
        return Proxy(cookie, *ids)
    container = pod.proxy_container_id if pod else None
    return Proxy(cookie, *ids, container) if container else None
