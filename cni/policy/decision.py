"""The capture decision in Python, rule by rule as in docs/semantics.md. Tests compare the kernel with it.

This code is written to be compared with Istio's rules, not to be fast. Two of Istio's rules are left out: a CNI plugin
never sets owner groups (O5), and virtual interfaces (I0) are refused at ADD.

If no rule of Istio's decides, the verdict has a word instead of a rule. "no IPv6" and "UDP" mean that these are not
captured. "self" is a packet from the pod itself; "transit" is a packet for an address that is not the pod's. "early-
outbound", "late-outbound" and "deny" are sidestep's own annotations. "no-route" is a connection that the kernel would
refuse: with Istio's rules it looks the route up before it asks them.
"""

import errno
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from bpf.layout import INBOUND_SOURCE6, SPREAD6
from cni.policy.annotations import CapturePolicy, Network

TUNNEL_PORT = 15008
DNS_PORT = 53
# in TPROXY mode, SO_MARK of the proxy's connections to the application; their source is the client's address
TPROXY_MARK = 1337

IPAddress = IPv4Address | IPv6Address
Action = Literal["pass", "proxy-outbound", "proxy-inbound", "dns", "refuse", "unreachable"]
# whether a socket with the proxy's ids was opened in the proxy's container; this counts for strict pods only
Container = Literal["trusted", "other", "unknown"]

# rules by which something passes that no annotation asks for
UNASKED = ("UDP", "no IPv6", "protocol")

_EVERYBODY = IPv4Address("255.255.255.255")
FIRST_LOOPBACK = frozenset((IPv4Address("127.0.0.1"), IPv6Address("::1")))
# the addresses that Istio's inbound clusters and probes of the application dial from
_INBOUND_SOURCES = frozenset((IPv4Address("127.0.0.6"), INBOUND_SOURCE6))


@dataclass(frozen=True)
class Verdict:
    """Where a connection goes, and the first rule that decided so."""

    action: Action
    rule: str


@dataclass(frozen=True)
class Outbound:
    """A TCP connection as connect() asks for it, or a UDP datagram. The port is in host order."""

    destination: IPAddress
    port: int
    source: IPAddress | None = None  # the address that the socket is bound to
    uid: int = 0  # of the process that opened the socket
    gid: int = 0
    own_addresses: frozenset[IPAddress] = frozenset()  # of all the pod's interfaces
    protocol: Literal["tcp", "udp"] = "tcp"
    interface: str | None = None  # the one that the route leaves through; "lo" for a local route
    mark: int = 0  # SO_MARK
    container: Container = "trusted"
    is_ipv6_captured: bool = True  # the pod's first address or ISTIO_DUAL_STACK says so
    has_proxy_started: bool = True  # whether the proxy has ever listened; counts with early and late outbound only
    route_error: int = 0  # the errno that the route causes; 0 if there is a route, or if that is unknown
    does_loopback_stay: bool = False  # whether the kernel is known to refuse to send from 127.0.0.0/8 to the outside
    is_pod_deleted: bool = False  # whether the Pod is being deleted; counts with late outbound only, as the next
    does_proxy_listen: bool = True  # whether anybody in the pod listens on 15001


@dataclass(frozen=True)
class Inbound:
    """A TCP connection or a UDP datagram that reaches the pod. The port is in host order."""

    port: int
    source: IPAddress
    own_addresses: frozenset[IPAddress] = frozenset()
    interface: str | None = None  # the one that it arrives on
    destination: IPAddress | None = None  # None: one of the pod's addresses
    protocol: Literal["tcp", "udp"] = "tcp"
    is_ipv6_captured: bool = True


def outbound(policy: CapturePolicy, conn: Outbound) -> Verdict:
    """Rules O0–O11 for a connection that a process in the pod opens, then T for the proxy's own in TPROXY mode."""
    if conn.port in policy.deny_outbound_ports and not is_through_lo(conn):
        return Verdict("refuse", "deny")
    if plain(conn.destination).version == 6 and not conn.is_ipv6_captured:
        word = "UDP" if conn.protocol == "udp" else "no IPv6"
        return _unless_denied(policy, conn, Verdict("pass", _excluding(policy, conn) or word))
    verdict = _redirected(policy, conn)
    if verdict.action == "pass" and _is_inbound_self_call(policy, conn):
        verdict = Verdict(_inbound_by_port(policy, conn.port).action, "T")
    if verdict.action in ("proxy-outbound", "dns") and policy.early_outbound and not conn.has_proxy_started:
        return Verdict("pass", "early-outbound")
    if verdict.action in ("proxy-outbound", "dns") and policy.late_outbound and _has_proxy_gone(conn):
        return Verdict("pass", "late-outbound")
    if verdict.action in ("proxy-outbound", "dns") and refusal(conn):
        return Verdict("unreachable", "no-route")
    return _unless_denied(policy, conn, verdict)


def _unless_denied(policy: CapturePolicy, conn: Outbound, verdict: Verdict) -> Verdict:
    """The same, but refused if the pod wants nothing past its proxy and no annotation asks for this."""
    is_proxys = conn.container == "trusted" and (conn.uid == policy.proxy_uid or conn.gid == policy.proxy_gid)
    if policy.uncaptured != "deny" or verdict.rule not in UNASKED or is_proxys or is_through_lo(conn):
        return verdict
    return Verdict("refuse", verdict.rule)


def _excluding(policy: CapturePolicy, conn: Outbound) -> str:
    """The rule by which an annotation excludes what is not captured anyway; "" if none does."""
    if _interface(conn, is_through_lo(conn)) in policy.exclude_interfaces:
        return "O0"
    if conn.port in policy.exclude_outbound_ports:
        return "O1"
    return "O8" if _within(routed(conn), policy.exclude_outbound) else ""


def refusal(conn: Outbound) -> int:
    """The errno with which the kernel refuses a connection, whatever the rules say; 0 if it does not."""
    destination, source = routed(conn), plain(conn.source) if conn.source else None
    if is_through_lo(conn):
        return 0
    if conn.protocol == "tcp" and (destination.is_multicast or destination == _EVERYBODY):
        return errno.ENETUNREACH
    if conn.route_error:
        return conn.route_error
    is_from_loopback = source is not None and source.version == 4 and source.is_loopback
    return errno.EINVAL if is_from_loopback and conn.does_loopback_stay else 0


def inbound(policy: CapturePolicy, conn: Inbound) -> Verdict:
    """Rules I1–I5 for a connection from outside. outbound() decides connections over the pod's own loopback."""
    if from_inside := beside_the_rules(conn):
        return from_inside
    if conn.port in policy.deny_inbound_ports:
        return Verdict("refuse", "deny")
    if conn.protocol == "udp":
        return Verdict("pass", "UDP")
    if plain(conn.source).version == 6 and not conn.is_ipv6_captured:
        return Verdict("pass", "no IPv6")
    if conn.interface in policy.exclude_interfaces:
        return Verdict("pass", "I1")
    return _inbound_by_port(policy, conn.port)


def beside_the_rules(conn: Inbound) -> Verdict | None:
    """The verdict on a connection that no rule is asked about: the pod's own, or one that it only forwards."""
    if _is_local(plain(conn.source), conn.own_addresses):
        return Verdict("pass", "self")
    if conn.destination is not None and plain(conn.destination) not in conn.own_addresses:
        return Verdict("pass", "transit")
    return None


def _has_proxy_gone(conn: Outbound) -> bool:
    """Whether the proxy has ended with its Pod. One that ends before has crashed."""
    return conn.is_pod_deleted and conn.has_proxy_started and not conn.does_proxy_listen


def _redirected(policy: CapturePolicy, conn: Outbound) -> Verdict:
    """The verdict of Istio's nat table: rules O0–O11."""
    destination = routed(conn)
    lo = is_through_lo(conn)
    tcp = conn.protocol == "tcp"
    dns = policy.dns_capture and conn.port == DNS_PORT
    self_call = tcp and lo and destination not in FIRST_LOOPBACK and conn.port != TUNNEL_PORT

    if _interface(conn, lo) in policy.exclude_interfaces:
        return Verdict("pass", "O0")
    if conn.port in policy.exclude_outbound_ports:
        return Verdict("pass", "O1")
    if lo and _is_from_inbound(conn):
        return Verdict("pass", "O2")
    # a self-call with the proxy's ids ends at the proxy, so the container does not matter
    is_user, is_group = conn.uid == policy.proxy_uid, conn.gid == policy.proxy_gid
    if is_user and self_call and not dns:
        return Verdict("proxy-inbound", "O3a")
    if is_user and conn.container != "other":
        return Verdict(_of_proxy(conn, lo), "O3c")
    # with DNS capture, this rule lets only TCP pass that is not DNS; no later rule captures UDP that is not DNS
    if lo and not policy.loopback_included and (not policy.dns_capture or (tcp and not dns)):
        return Verdict("pass", "O3b")
    # O4b would be O3b for the group; O3b has decided all its cases already
    if is_group and self_call:
        return Verdict("proxy-inbound", "O4a")
    if is_group and conn.container != "other":
        return Verdict(_of_proxy(conn, lo), "O4c")
    if dns:
        return Verdict("dns", "O6")
    if destination in FIRST_LOOPBACK:
        return Verdict("pass", "O7")
    if _within(destination, policy.exclude_outbound):
        return Verdict("pass", "O8")
    if not tcp:
        return Verdict("pass", "UDP")
    if conn.port in policy.include_outbound_ports:
        return Verdict("proxy-outbound", "O9")
    if policy.outbound_all or _within(destination, policy.include_outbound):
        return Verdict("proxy-outbound", "O10")
    return Verdict("pass", "O11")


def _of_proxy(conn: Outbound, lo: bool) -> Action:
    """Connections of the proxy pass. If its container is not known yet, those that leave the pod are refused."""
    return "refuse" if conn.container == "unknown" and not lo else "pass"


def _is_inbound_self_call(policy: CapturePolicy, conn: Outbound) -> bool:
    """Whether TPROXY mode treats a connection as inbound: the proxy calls its own pod, but not the application."""
    destination = routed(conn)
    return (
        policy.mode == "TPROXY"
        and conn.protocol == "tcp"
        and is_through_lo(conn)
        and destination not in FIRST_LOOPBACK
        and not _is_from_inbound(conn)
        and (conn.uid == policy.proxy_uid or conn.gid == policy.proxy_gid)
        and conn.mark != TPROXY_MARK
        and "lo" not in policy.exclude_interfaces
    )


def _inbound_by_port(policy: CapturePolicy, port: int) -> Verdict:
    if not policy.inbound_all and not policy.include_inbound_ports:
        return Verdict("pass", "I2")
    if port == TUNNEL_PORT and policy.mode == "REDIRECT":
        return Verdict("pass", "I3")
    if policy.inbound_all:
        return Verdict("pass" if port in policy.exclude_inbound_ports else "proxy-inbound", "I4")
    return Verdict("proxy-inbound" if port in policy.include_inbound_ports else "pass", "I5")


def _is_from_inbound(conn: Outbound) -> bool:
    """Whether the source is 127.0.0.6 or ::6. The kernel chooses ::6 for IPv6 addresses that are local by a route."""
    destination = routed(conn)
    if conn.source is not None and not plain(conn.source).is_unspecified:
        return plain(conn.source) in _INBOUND_SOURCES
    return destination.version == 6 and conn.interface == "lo" and not _is_local(destination, conn.own_addresses)


def is_through_lo(conn: Outbound) -> bool:
    """Whether the route leaves through lo."""
    return conn.interface == "lo" or _is_local(routed(conn), conn.own_addresses)


def _interface(conn: Outbound, lo: bool) -> str | None:
    return "lo" if lo else conn.interface


def plain(address: IPAddress) -> IPAddress:
    """An IPv4-mapped address as IPv4, because IPv4 leaves the socket; any other address unchanged."""
    return getattr(address, "ipv4_mapped", None) or address


def routed(conn: Outbound) -> IPAddress:
    """Where the kernel really connects to. For 0.0.0.0 that is the socket's own address, or loopback; for ::, ::1."""
    asked = plain(conn.destination)
    if not asked.is_unspecified:
        return asked
    if asked.version == 6:
        return IPv6Address("::1")
    bound = plain(conn.source) if conn.source else asked
    return IPv4Address("127.0.0.1") if bound.is_unspecified or bound.version == 6 else bound


def _is_local(address: IPAddress, own_addresses: frozenset[IPAddress]) -> bool:
    """Whether the route goes through lo: to loopback, the pod's own addresses, and what every mesh pod has on lo."""
    return (
        address.is_loopback or address in _INBOUND_SOURCES or _within(address, (SPREAD6,)) or address in own_addresses
    )


def _within(address: IPAddress, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)
