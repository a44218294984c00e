"""Ambient mode in the running agent. Imported only if it is on: ztunnel's protocol takes 5 MiB."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import structlog

from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.adoption import Adoption
from cni.enrolment.kubelet import Kubelet
from cni.enrolment.whose_netns import inhabited
from cni.enrolment.ztunnels import Ztunnels
from cni.netns.cgroups import NotShown
from cni.netns.namespaces import find_netns
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.enablement import DEFAULT, Enablement
from installer.agent.places import Places
from installer.ambient import node as ambient
from installer.ambient.capture import KernelCapture
from installer.ambient.members import Members
from installer.ambient.peer import PeerUnknown, pid_of
from installer.pods.namespaces import ClusterNamespaces
from installer.pods.source import Source
from installer.settings import Ambient, Node

log = structlog.get_logger("ambient")

# seconds of a request for an annotation: an ADD waits for it, and the plugin waits 10 for the ADD
_ANNOTATE_SECONDS = 3.0
# seconds that the start waits for the namespaces
_SYNC_SECONDS = 5.0


class AmbientMode:
    """The node's ambient pods, the namespaces that they depend on, and the ztunnels that serve them."""

    def __init__(
        self,
        settings: Ambient,
        node: Node,
        source: Source,
        capture: KernelCapture,
        adoption: Adoption,
        pins: Pins,
        tables: Tables,
        places: Places,
    ) -> None:
        """Of a source with an API server. Raises InvalidSelectors."""
        assert source.api is not None, "the agent has looked before"
        self.namespaces = ClusterNamespaces(source.api)
        self._source, self._proc = source, node.proc
        self._kubelet, self._told = Kubelet(pins, tables, node.proc), ""
        self._ztunnels = Ztunnels(tables, places.every, node.proc)
        self.members = Members(
            ambient.Node(
                pods=source.pods,
                namespaces=self.namespaces,
                enablement=Enablement(
                    settings.ambient_enablement_selector or DEFAULT, settings.system_namespace, node.exclude_namespaces
                ),
                capture=capture,
                inhabited=lambda pods: inhabited(pods, node.proc),
                find_netns=lambda cookies: find_netns(cookies, proc=node.proc),
                identity=lambda each: adoption.identity_of(each.pod, each.crowd),
                recognise=self._recognise,
                annotate=partial(source.api.annotate_pod, seconds=_ANNOTATE_SECONDS),
                events=source.events,
                policy=AmbientPolicy(dns_capture=settings.ambient_dns_capture, ipv6=settings.ambient_ipv6),
            ),
            settings.ztunnel_uds_address,
        )

    def subscribe(self) -> None:
        """Hear of changed Pods and namespaces. Before the source runs."""
        self._source.subscribe(self.members.changed)
        self.namespaces.subscribe(self.members.namespace_changed)

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """Watch namespaces, serve ztunnel, and look at all pods about every `seconds`, until the context ends."""
        with ExitStack() as up:
            up.enter_context(self.namespaces.running())
            if not self.namespaces.wait_synced(_SYNC_SECONDS):
                log.warning("namespaces.not_synced", seconds=_SYNC_SECONDS, consequence="new pods wait until they are")
            up.enter_context(self.members.running(seconds))
            yield

    def look_for_kubelet(self) -> Mapping[str, int]:
        """Have kubelet's probes reach the applications. Says once why they can't. Raises KernelRefused, NotAttached."""
        problem = self._kubelet.look()
        if problem and problem != self._told:
            log.warning("kubelet.unknown", problem=problem, consequence="ztunnel gets the probes of pods as well")
        self._told = problem
        return {}

    def _recognise(self, peer: socket.socket) -> None:
        """Have the programs take the sockets of this ztunnel for ztunnel's. Raises SidestepError."""
        try:
            self._ztunnels.forget_gone()
            self._ztunnels.learn(pid_of(peer, self._proc))
        except (OSError, NotShown) as error:
            raise PeerUnknown(f"ztunnel's cgroup can't be found: {error}") from error
