"""Enrols pods that run already: made before the plugin was in the chain, or while it was kept from doing its work.

No CNI call tells of them, so their namespaces are found through their processes. Their proxies listen already, which
the programs have not seen: listeners.py fetches those sockets. Connections that exist stay what they are, the next ones
are captured.
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

_IFNAME = "eth0"  # what runtimes call a pod's first interface


@dataclass(frozen=True)
class Adopted:
    """What became of one pod: it is enrolled unless there is a `problem`, or a reason why it is left alone."""

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
        """Enrol pods that are not; an outcome for each whose namespace was found, and none for the others.

        A pod without a process has none to find. One walk of /proc serves all of them.
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
        """Look again for the listeners of enrolled pods that have none: one that was bound before the pod was enrolled,
        and began to listen after it, nobody has seen. Returns how many were found.

        `unheard` are the inodes of their namespaces, `pods` what is known of them, both by cookie.
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
        """By UID or container in the cgroups' paths, else by address: not every runtime's paths show them.

        A container may have namespaces below the pod's, which are never as old.
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
            return Adopted(pod, left_alone="Istio's own rules capture it in its namespace, until it is made anew")
        ids = outside_ids(netns, policy.proxy_uid, policy.proxy_gid)
        proxy = _proxy(cookie, ids, policy.strict_proxy, pod)
        # before the pod is seen by the programs: from then on what is captured and finds no listener is refused
        count = self._register_listeners(proxy, False, crowd)
        if not self.admission.adopt(self._identity(pod, crowd), policy, netns):
            return Adopted(pod, left_alone="it was enrolled meanwhile")
        # and after it, as those that were about to listen have not been seen either
        count += self._register_listeners(proxy, policy.early_outbound, crowd)
        log.info("pod.adopted", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie, listeners=count)
        return Adopted(pod, cookie=cookie, listeners=count)

    def _identity(self, pod: Pod, crowd: Crowd) -> Identity:
        """With the sandbox's own container, whose id a DEL will have: that of the oldest process, where it has one.

        Else the DEL's namespace says which pod is meant, or the end of it removes the pod. The network is left open, so
        that no GC takes it for a left-over.
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
                # as in sockops.c: istio-validation listens here too, but on 127.0.0.1
                elif listener.port == OUTBOUND_PORT and early_outbound and listener.anywhere:
                    enrolments.has_started(proxy.cookie)
        return count


def _proxy(cookie: int, ids: tuple[int, int], strict: bool, pod: Pod | None) -> Proxy | None:
    """Who is the proxy; None when that is not known yet: a strict pod's is its container alone."""
    if not strict:
        return Proxy(cookie, *ids)
    container = pod.proxy_container_id if pod else None
    return Proxy(cookie, *ids, container) if container else None
