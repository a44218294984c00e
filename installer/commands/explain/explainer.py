"""What becomes of a connection, by the reference decision and what the maps have of the pod; docs/semantics.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from bpf.errors import SidestepError
from bpf.tables import Tables
from cni.netns.proc_net import plain
from cni.policy import decision
from cni.policy.annotations import CapturePolicy
from cni.policy.decision import TUNNEL_PORT, Container, Inbound, IPAddress, Outbound, Verdict
from installer.commands.pods.enrolled_pods import EnrolledPod, interface_name

Protocol = Literal["tcp", "udp"]


@dataclass(frozen=True)
class Explanation:
    """A connection, the policy that decides about it, and what it says."""

    policy: CapturePolicy
    asked: Outbound | Inbound
    verdict: Verdict

    @property
    def word(self) -> str:
        """What became of it, as the counters call it."""
        if self.verdict.rule == "deny":
            return "denied"
        return {"pass": "direct", "refuse": "refused"}.get(self.verdict.action, "captured")


@dataclass(frozen=True)
class Asker:
    """Who opens the socket; ids as the initial user namespace has them. `is_proxy`: in the proxy's container."""

    uid: int = 0
    gid: int = 0
    is_proxy: bool = False


class Explainer:
    """Asks the reference about one enrolled pod. `interfaces` are its namespace's, as far as known, by index."""

    def __init__(self, pod: EnrolledPod, tables: Tables, interfaces: Mapping[int, str]) -> None:
        self.pod = pod
        self._tables = tables
        self._interfaces = interfaces
        self._policy = pod.deciding(interfaces)

    def asker(self) -> Asker:
        """The pod's proxy."""
        return Asker(self.pod.entry.proxy_uid, self.pod.entry.proxy_gid, is_proxy=True)

    def outbound(
        self,
        destination: IPAddress,
        port: int,
        by: Asker,
        protocol: Protocol = "tcp",
        source: IPAddress | None = None,
        mark: int = 0,
        interface: str | None = None,
    ) -> Explanation:
        """A connect() of the pod. `source` and `interface` are what the socket is bound to. Raises SidestepError."""
        asked = Outbound(
            destination,
            port,
            source,
            by.uid,
            by.gid,
            self.pod.addresses,
            protocol,
            self._interface(interface, plain(destination)),
            mark,
            self._container(by),
            self.pod.is_ipv6_captured,
            self.pod.has_started,
        )
        return Explanation(self._policy, asked, decision.outbound(self._policy, asked))

    def inbound(
        self,
        source: IPAddress,
        port: int,
        destination: IPAddress | None = None,
        protocol: Protocol = "tcp",
        interface: str | None = None,
    ) -> Explanation:
        """What arrives from `source`; by the interface that leads back to it unless said. Raises SidestepError."""
        asked = Inbound(
            port,
            source,
            self.pod.addresses,
            self._interface(interface, plain(source)),
            destination,
            protocol,
            self.pod.is_ipv6_captured,
        )
        return Explanation(self._policy, asked, decision.inbound(self._policy, asked))

    def inbound_ports(
        self, source: IPAddress, destination: IPAddress | None = None, interface: str | None = None
    ) -> tuple[Explanation, list[Explanation]]:
        """What arrives on TCP ports in general, and on those of which something else becomes."""
        policy = self._policy
        named = {TUNNEL_PORT} | policy.deny_inbound_ports | policy.exclude_inbound_ports | policy.include_inbound_ports
        asked = (next(port for port in range(1024, 65536) if port not in named), *sorted(named))
        general, *each = (self.inbound(source, port, destination, interface=interface) for port in asked)
        return general, [one for one in each if one.verdict.action != general.verdict.action]

    def _interface(self, wanted: str | None, far: IPAddress) -> str | None:
        if wanted is None:
            index = self.pod.interface_to(self._tables, far)
            return None if index is None else interface_name(index, self._interfaces)
        if wanted not in self._interfaces.values():
            known = ", ".join(sorted(self._interfaces.values())) or "cannot be looked at"
            raise SidestepError(f"{self.pod.identity} has no interface {wanted}; its namespace: {known}")
        return wanted

    def _container(self, by: Asker) -> Container:
        if not self._policy.strict_proxy:
            return "trusted"
        if self.pod.proxy_cgroup is None:
            return "unknown"
        return "trusted" if by.is_proxy else "other"


def routed(asked: Outbound) -> IPAddress:
    """The address that the kernel dials when nothing is captured."""
    to, bound = plain(asked.destination), plain(asked.source) if asked.source else None
    if not to.is_unspecified:
        return to
    if to.version == 6:
        return IPv6Address("::1")
    return bound if isinstance(bound, IPv4Address) and not bound.is_unspecified else IPv4Address("127.0.0.1")
