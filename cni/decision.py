"""The capture decision in Python, rule by rule as in docs/semantics.md: the reference that bpf/policy.h is tested with.

Written to be compared with Istio's rules, not to be fast. Interface rules (O0, I0, I1), owner groups (O5) and DNS (O6)
are not in yet. Whether a Pod's IPv6 is captured at all depends on its addresses and is decided before.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from cni.annotations import CapturePolicy, Network

TUNNEL_PORT = 15008

IPAddress = IPv4Address | IPv6Address
Action = Literal["pass", "proxy-outbound", "proxy-inbound"]

_FIRST_LOOPBACK = frozenset((IPv4Address("127.0.0.1"), IPv6Address("::1")))
# where Istio's inbound clusters and app probes dial from
_INBOUND_SOURCES = frozenset((IPv4Address("127.0.0.6"), IPv6Address("::6")))


@dataclass(frozen=True)
class Verdict:
    """Where a connection goes, and the first rule that said so."""

    action: Action
    rule: str


@dataclass(frozen=True)
class Outbound:
    """A TCP connection as its connect() asks for it."""

    destination: IPAddress
    port: int
    source: IPAddress | None = None  # what the socket is bound to
    uid: int = 0
    gid: int = 0
    own_addresses: frozenset[IPAddress] = frozenset()  # of all the pod's interfaces


@dataclass(frozen=True)
class Inbound:
    """A TCP connection that reaches one of the pod's addresses."""

    port: int
    source: IPAddress
    own_addresses: frozenset[IPAddress] = frozenset()


def outbound(policy: CapturePolicy, conn: Outbound) -> Verdict:
    """Rules O1–O11 for a connection that a process in the pod opens."""
    destination = _routed(conn.destination)
    lo = _is_local(destination, conn.own_addresses)
    self_call = lo and destination not in _FIRST_LOOPBACK and conn.port != TUNNEL_PORT

    if conn.port in policy.exclude_outbound_ports:
        return Verdict("pass", "O1")
    if lo and conn.source is not None and _plain(conn.source) in _INBOUND_SOURCES:
        return Verdict("pass", "O2")
    if conn.uid == policy.proxy_uid:
        return Verdict("proxy-inbound", "O3a") if self_call else Verdict("pass", "O3c")
    # O4b is the same condition for the group, so it never comes to it
    if lo and not policy.loopback_included:
        return Verdict("pass", "O3b")
    if conn.gid == policy.proxy_gid:
        return Verdict("proxy-inbound", "O4a") if self_call else Verdict("pass", "O4c")
    if destination in _FIRST_LOOPBACK:
        return Verdict("pass", "O7")
    if _within(destination, policy.exclude_outbound):
        return Verdict("pass", "O8")
    if conn.port in policy.include_outbound_ports:
        return Verdict("proxy-outbound", "O9")
    if policy.outbound_all or _within(destination, policy.include_outbound):
        return Verdict("proxy-outbound", "O10")
    return Verdict("pass", "O11")


def inbound(policy: CapturePolicy, conn: Inbound) -> Verdict:
    """Rules I2–I5 for a connection from outside; what comes through the pod's own loopback was decided outbound."""
    if _is_local(_plain(conn.source), conn.own_addresses):
        return Verdict("pass", "self")
    if not policy.inbound_all and not policy.include_inbound_ports:
        return Verdict("pass", "I2")
    if conn.port == TUNNEL_PORT:
        return Verdict("pass", "I3")
    if policy.inbound_all:
        is_excluded = conn.port in policy.exclude_inbound_ports
        return Verdict("pass" if is_excluded else "proxy-inbound", "I4")
    is_included = conn.port in policy.include_inbound_ports
    return Verdict("proxy-inbound" if is_included else "pass", "I5")


def _plain(address: IPAddress) -> IPAddress:
    """IPv4-mapped addresses as IPv4: that is what leaves the socket."""
    return getattr(address, "ipv4_mapped", None) or address


def _routed(address: IPAddress) -> IPAddress:
    """Where the kernel really connects to: the unspecified address means the first loopback one."""
    plain = _plain(address)
    if not plain.is_unspecified:
        return plain
    return IPv4Address("127.0.0.1") if plain.version == 4 else IPv6Address("::1")


def _is_local(address: IPAddress, own_addresses: frozenset[IPAddress]) -> bool:
    """Whether the route goes through lo; ::6 is on every mesh pod's."""
    return address.is_loopback or address in _INBOUND_SOURCES or address in own_addresses


def _within(address: IPAddress, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)
