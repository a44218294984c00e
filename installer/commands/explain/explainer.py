"""Applies the reference decision (docs/semantics.md) to a connection, with the pod's policy from the maps."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from bpf.errors import SidestepError
from bpf.layout import PodFlags
from bpf.tables import Tables
from cni.enrolment.ambient import ambient_policy_of_flags
from cni.enrolment.steered import Steering
from cni.enrolment.strays import NO_STRAYS, PodProcesses
from cni.netns.proc_net import plain
from cni.netns.routes import LO
from cni.policy import ambient_decision, decision
from cni.policy.ambient_decision import ZTUNNEL_MARK
from cni.policy.annotations import CapturePolicy
from cni.policy.decision import TUNNEL_PORT, Container, Inbound, IPAddress, Outbound, Verdict
from installer.commands.pods.enrolled_pods import EnrolledPod, interface_name

Protocol = Literal["tcp", "udp"]
STRAY = "stray"  # the rule that decides if nothing of the pod's is seen by the programs
DETACHED = "not attached"  # the rule that decides if the program is gone that would have decided


@dataclass(frozen=True)
class Explanation:
    """A connection, the policy that decides about it, and its verdict."""

    policy: CapturePolicy
    asked: Outbound | Inbound
    verdict: Verdict
    is_ambient: bool = False  # then `policy` says nothing

    @property
    def word(self) -> str:
        """The verdict as the counters call it: direct, captured, refused, denied or unreachable."""
        if self.verdict.rule == "deny":
            return "denied"
        words = {"pass": "direct", "refuse": "refused", "unreachable": "unreachable"}
        return words.get(self.verdict.action, "captured")


@dataclass(frozen=True)
class Asker:
    """The process that opens the socket. Ids are the initial user namespace's.

    `is_proxy`: in the proxy's container, which is ztunnel's in ambient mode.
    """

    uid: int = 0
    gid: int = 0
    is_proxy: bool = False


class Explainer:
    """Explains connections of one enrolled pod. `interfaces` are those of its namespace by index, as far as known."""

    def __init__(
        self,
        pod: EnrolledPod,
        tables: Tables,
        interfaces: Mapping[int, str],
        steering: Steering = Steering.STEERED,
        processes: PodProcesses = NO_STRAYS,
        detached: Collection[str] = (),
        does_proxy_listen: bool = True,
    ) -> None:
        """`detached` are the hooks of outbound programs that are attached nowhere on the node.

        `does_proxy_listen` says whether anybody in the pod listens on 15001.
        """
        self._does_proxy_listen = does_proxy_listen
        self.pod = pod
        self._detached = frozenset(detached)
        self._steering, self._processes = steering, processes
        self._tables = tables
        self._interfaces = interfaces
        self._policy = pod.deciding(interfaces)
        self._ambient = ambient_policy_of_flags(pod.flags) if PodFlags.AMBIENT in pod.flags else None

    def asker(self) -> Asker:
        """The pod's proxy as the process that opens the socket."""
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
        """Explain a connect() in the pod, of a socket bound to `source` and `interface`. Raises SidestepError."""
        if self._ambient and by.is_proxy and not mark:
            mark = ZTUNNEL_MARK
        route = self.pod.route_to(self._tables, plain(destination))
        is_routed = interface is None and not mark and not (protocol == "udp" and route and route.ifindex)
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
            route.error if route and is_routed else 0,
            PodFlags.LOOPBACK_STAYS in self.pod.flags,
            PodFlags.DELETED in self.pod.flags,
            self._does_proxy_listen,
        )
        if self._ambient:
            verdict = ambient_decision.outbound(self._ambient, asked)
        else:
            verdict = decision.outbound(self._policy, asked)
        if verdict.action != "pass" and self._processes.are_all_strays:
            verdict = Verdict("pass", STRAY)
        elif verdict.action not in ("pass", "unreachable") and self._detached & _hooks(asked):
            verdict = Verdict("pass", DETACHED)
        return Explanation(self._policy, asked, verdict, self._ambient is not None)

    def inbound(
        self,
        source: IPAddress,
        port: int,
        destination: IPAddress | None = None,
        protocol: Protocol = "tcp",
        interface: str | None = None,
    ) -> Explanation:
        """Explain a connection from `source`. Raises SidestepError.

        Without `interface`, it arrives by the interface through which the pod reaches `source`.
        """
        asked = Inbound(
            port,
            source,
            self.pod.addresses | self._at_home(destination),
            self._interface(interface, plain(source)),
            destination,
            protocol,
            self.pod.is_ipv6_captured,
        )
        if self._ambient:
            verdict = ambient_decision.inbound(self._ambient, asked)
        else:
            verdict = decision.inbound(self._policy, asked)
        if verdict.action != "pass" and self._steering == Steering.NOT_STEERED:  # so nothing of ours sees the packet
            verdict = Verdict("pass", str(Steering.NOT_STEERED))
        return Explanation(self._policy, asked, verdict, self._ambient is not None)

    def inbound_ports(
        self, source: IPAddress, destination: IPAddress | None = None, interface: str | None = None
    ) -> tuple[Explanation, list[Explanation]]:
        """Explain connections to TCP ports in general, then those to each port with another verdict."""
        policy = self._policy
        named = {TUNNEL_PORT} | policy.deny_inbound_ports | policy.exclude_inbound_ports | policy.include_inbound_ports
        asked = (next(port for port in range(1024, 65536) if port not in named), *sorted(named))
        general, *each = (self.inbound(source, port, destination, interface=interface) for port in asked)
        return general, [one for one in each if one.verdict.action != general.verdict.action]

    def _at_home(self, destination: IPAddress | None) -> frozenset[IPAddress]:
        """A destination that the pod has by a local route."""
        if destination is None:
            return frozenset()
        route = self.pod.route_to(self._tables, plain(destination))
        is_local = route is not None and route.ifindex == LO and not route.error
        return frozenset((plain(destination),)) if is_local else frozenset()

    def _interface(self, wanted: str | None, far: IPAddress) -> str | None:
        if wanted is None:
            route = self.pod.route_to(self._tables, far)
            return interface_name(route.ifindex, self._interfaces) if route and not route.error else None
        if wanted not in self._interfaces.values():
            known = ", ".join(sorted(self._interfaces.values())) or "unknown"
            raise SidestepError(f"{self.pod.identity} has no interface {wanted}; its interfaces: {known}")
        return wanted

    def _container(self, by: Asker) -> Container:
        if self._ambient:
            return "trusted" if by.is_proxy else "other" if self._tables.ztunnels() else "unknown"
        if not self._policy.strict_proxy:
            return "trusted"
        if self.pod.proxy_cgroup is None:
            return "unknown"
        return "trusted" if by.is_proxy else "other"


def _hooks(asked: Outbound) -> frozenset[str]:
    """The programs that decide. The socket's family counts: ::ffff:192.0.2.1 is dialled by a socket of IPv6."""
    calls = ("connect", "sendmsg") if asked.protocol == "udp" else ("connect",)
    return frozenset(f"{call}{asked.destination.version}" for call in calls)


def routed(asked: Outbound) -> IPAddress:
    """The address that the kernel dials if the connection is not captured."""
    to, bound = plain(asked.destination), plain(asked.source) if asked.source else None
    if not to.is_unspecified:
        return to
    if to.version == 6:
        return IPv6Address("::1")
    return bound if isinstance(bound, IPv4Address) and not bound.is_unspecified else IPv4Address("127.0.0.1")
