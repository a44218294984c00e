"""ctypes mirror of maps.h, in its order; tests/unit/test_layout.py compares the two field by field.

Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Fields whose names end in _be are in network order, all
others in host order. A pod is identified by the cookie of its network namespace. maps.h explains each field.
"""

import ctypes
import socket
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

U8, U16, U32, U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
RESOLVER_PORT = 15053
FAMILY_SLOTS = 2
LISTENER_SLOTS = 2 * FAMILY_SLOTS
ZTUNNELS = 8
COOKIE_MARK = 0x7369646573746570
STEERING_INSTRUCTIONS = 256
STEERING_MAPS = 4
# SPREAD4 and SPREAD6 of maps.h: captured connections go to these addresses, and nothing else may use them
SPREAD4 = IPv4Network("127.64.0.0/10")
SPREAD6 = IPv6Network("fd73:6964:6573:7465::/64")
# where Istio's inbound clusters and probes dial from in IPv6; 127.0.0.6 needs no address, ::6 does
INBOUND_SOURCE6 = IPv6Address("::6")

_MAPPED = bytes(10) + b"\xff\xff"


class PodFlags(IntFlag):
    """Flags of struct pod: POD_* of maps.h."""

    IPV6 = 1 << 0
    OUTBOUND_ALL = 1 << 1
    INBOUND_ALL = 1 << 2
    PORT_RULES = 1 << 3
    NETWORKS = 1 << 4
    LOOPBACK_INCLUDED = 1 << 5
    INTERFACES = 1 << 6
    DNS = 1 << 7
    TPROXY = 1 << 8
    EARLY_OUTBOUND = 1 << 9
    STRICT = 1 << 10
    ROUTES = 1 << 11
    DENIES = 1 << 12
    LOOPBACK_STAYS = 1 << 13
    UNCAPTURED_DENIED = 1 << 14
    UNCAPTURED_AUDITED = 1 << 15
    LIVE_POLICY = 1 << 16
    LATE_OUTBOUND = 1 << 17
    DELETED = 1 << 18
    SHADOW = 1 << 19
    AMBIENT = 1 << 20
    BYPASS_INBOUND = 1 << 21
    TRUSTS_MARK = 1 << 22


class PortRule(IntFlag):
    """Values of port_rules: PORT_* of maps.h."""

    EXCLUDE_OUTBOUND = 1 << 0
    INCLUDE_OUTBOUND = 1 << 1
    EXCLUDE_INBOUND = 1 << 2
    INCLUDE_INBOUND = 1 << 3
    DENY_OUTBOUND = 1 << 4
    DENY_INBOUND = 1 << 5


class NetworkVerdict(IntEnum):
    """Values of networks: NETWORK_* of maps.h."""

    EXCLUDED = 1
    INCLUDED = 2


class Address(ctypes.Structure):
    """An address of either family, 16 bytes in network order; hashable by its bytes."""

    _fields_ = [("bytes", U8 * 16)]

    @classmethod
    def of(cls, ip: IPv4Address | IPv6Address | None) -> "Address":
        """The map form of `ip`; None is all zero, which the programs read as "none"."""
        if ip is None:
            return cls()
        return cls.from_buffer_copy(_MAPPED + ip.packed if ip.version == 4 else ip.packed)

    def ip(self) -> IPv4Address | IPv6Address:
        """The address as an object of Python's ipaddress; ::ffff:a.b.c.d becomes an IPv4Address."""
        raw = bytes(self.bytes)
        return IPv4Address(raw[12:]) if raw[:12] == _MAPPED else IPv6Address(raw)


class PodEntry(ctypes.Structure):
    """Value of pods. One mesh pod: first what the decision needs, then the pod's identity."""

    _fields_ = [
        ("flags", U32),
        ("policy", U16),
        ("zero16", U16),
        ("proxy_uid", U32),
        ("proxy_gid", U32),
        ("port_rules", U32),
        ("networks", U32),
        ("acceleration", U32),
        ("source4", Address),
        ("source6", Address),
        ("uid", ctypes.c_char * 64),
        ("name", ctypes.c_char * 256),
        ("namespace", ctypes.c_char * 64),
        ("container_id", ctypes.c_char * 136),
        ("network", ctypes.c_char * 128),
        ("ifname", ctypes.c_char * 16),
        ("excluded_interfaces", ctypes.c_char * 512),
    ]


class Cookie(ctypes.Structure):
    """Key of every map that has one entry per pod: the cookie of its network namespace."""

    _fields_ = [("cookie", U64)]


class PortKey(ctypes.Structure):
    """Key of port_rules. `policy` is the number of the pod's policy that the row is of."""

    _fields_ = [("cookie", U64), ("port", U16), ("policy", U16), ("zero32", U32)]


class NetworkKey(ctypes.Structure):
    """Key of networks and routes: 64 bits of cookie, 32 bits of family and policy, then the prefix."""

    _pack_ = 1
    _fields_ = [("prefixlen", U32), ("cookie", U64), ("family", U16), ("policy", U16), ("address", Address)]

    @classmethod
    def of(cls, cookie: int, network: IPv4Network | IPv6Network, policy: int = 0) -> "NetworkKey":
        """The key of one pod's prefix; `cookie` is the pod's. `policy` is its policy's number; 0 in routes."""
        family, mapped_bits = (socket.AF_INET, 96) if network.version == 4 else (socket.AF_INET6, 0)
        bits = 64 + 32 + mapped_bits + network.prefixlen
        return cls(bits, cookie, family, policy, Address.of(network.network_address))

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The prefix. The key's length also counts the bits of cookie, family and policy, and of ::ffff:0:0/96."""
        bits, raw = self.prefixlen - 64 - 32, bytes(self.address.bytes)
        if self.family == socket.AF_INET:
            return IPv4Network((raw[12:], bits - 96), strict=False)
        return IPv6Network((raw, bits), strict=False)


class AddressKey(ctypes.Structure):
    """Key of addresses: a pod, and an address that it has."""

    _fields_ = [("cookie", U64), ("address", Address)]

    @classmethod
    def of(cls, cookie: int, ip: IPv4Address | IPv6Address) -> "AddressKey":
        """The key of an address that one pod has."""
        return cls(cookie, Address.of(ip))


class OwnAddressEntry(ctypes.Structure):
    """An address of a pod: its interface, and what a connection of the pod to it comes from."""

    _fields_ = [("ifindex", U32), ("source", Address)]


class RouteEntry(ctypes.Structure):
    """Value of routes: the interface by which packets leave, the errno if they do not, and their source address."""

    _fields_ = [("ifindex", U32), ("error", U32), ("source", Address)]


class InterfaceKey(ctypes.Structure):
    """Key of interfaces."""

    _fields_ = [("cookie", U64), ("ifindex", U32), ("zero32", U32)]


class ListenerKey(ctypes.Structure):
    """Key of listeners."""

    _fields_ = [("cookie", U64), ("port", U16), ("slot", U16), ("zero32", U32)]


def slots_of(family: int) -> range:
    """The slots of a family's listeners: those of IPv4 come first."""
    first = FAMILY_SLOTS if family == socket.AF_INET6 else 0
    return range(first, first + FAMILY_SLOTS)


class ConnectionKey(ctypes.Structure):
    """Key of handshakes, dials and arrivals."""

    _fields_ = [
        ("cookie", U64),
        ("client", Address),
        ("server", Address),
        ("client_port", U16),
        ("server_port", U16),
        ("zero32", U32),
    ]


class DestinationEntry(ctypes.Structure):
    """Value of handshakes: an original destination."""

    _fields_ = [("address", Address), ("port_be", U16), ("family", U16), ("zero32", U32)]


class Level(IntEnum):
    """enum level: how far acceleration goes."""

    OFF = 0
    PROXY = 1
    FULL = 2

    def __str__(self) -> str:
        return self.name.lower()


# levels by their names in settings and annotations
LEVELS = {str(level): level for level in Level}


class Connection(ctypes.Structure):
    """Key of meetings: one TCP connection."""

    _fields_ = [
        ("client", Address),
        ("server", Address),
        ("client_port", U16),
        ("server_port", U16),
        ("client_sequence", U32),
        ("server_sequence", U32),
    ]


class EndKey(ctypes.Structure):
    """Key of accelerated: one end of a connection."""

    _fields_ = [("cookie", U64), ("connection", Connection), ("side", U32)]


class MeetingEntry(ctypes.Structure):
    """Value of meetings. In user space only `sidestep maps` reads it."""

    _fields_ = [("cookie", U64), ("client", U64), ("server", U64), ("level", U32), ("captured", U32)]


class TrafficEntry(ctypes.Structure):
    """Value of traffic: how a pod's messages went. The numbers are of one CPU, or summed over all CPUs."""

    _fields_ = [
        ("redirected", U64),
        ("redirected_bytes", U64),
        ("undrained", U64),
        ("over_budget", U64),
        ("no_peer", U64),
    ]


class TallyEntry(ctypes.Structure):
    """Value of tallies: a pod's connections in the order of TOTALS, of one CPU or summed over all CPUs."""

    _fields_ = [("connections", U64 * 11)]


class Way(IntEnum):
    """Field way of an UncapturedKey: WAY_* of maps.h."""

    OUT = 0
    IN = 1
    SOCKET = 2


class UncapturedKey(ctypes.Structure):
    """Key of uncaptured: a pod and a remote end; `port` in host order, the pod's own if `way` is Way.IN."""

    _fields_ = [
        ("cookie", U64),
        ("remote", Address),
        ("port", U16),
        ("protocol", U8),
        ("way", U8),
        ("outcome", U32),
    ]


class QuestionKey(ctypes.Structure):
    """Key of questions: who was asked, and on which port (host order); `way` is Way.OUT or Way.IN."""

    _fields_ = [("cookie", U64), ("remote", Address), ("port", U16), ("way", U16), ("zero32", U32)]


class UncapturedEntry(ctypes.Structure):
    """Value of uncaptured. Times are CLOCK_MONOTONIC in ns."""

    _fields_ = [
        ("count", U64),
        ("first", U64),
        ("last", U64),
        ("rule", U32),
        ("pid", U32),
        ("uid", U32),
        ("zero32", U32),
        ("command", ctypes.c_char * 16),
    ]


class CoverageEntry(ctypes.Structure):
    """Value of coverage: a pod's sums in the order of PASSAGES, and how its entries of uncaptured came and did not."""

    _fields_ = [("passages", U64 * 7), ("added", U64), ("dropped", U64)]


class FlowWay(IntEnum):
    """Field way of a FlowKey: FLOW_* of maps.h."""

    CAPTURED = 0
    DIRECT = 1
    INBOUND = 2


class FlowKey(ctypes.Structure):
    """Key of flows: a pod, and the destination; for FlowWay.INBOUND the pod's own port. `port` in host order."""

    _fields_ = [("cookie", U64), ("remote", Address), ("port", U16), ("way", U16), ("zero32", U32)]


class FlowEntry(ctypes.Structure):
    """Value of flows and flow_totals: sums of closed connections; bytes, `rtt` in µs, `duration` and `last` in ns."""

    _fields_ = [
        ("connections", U64),
        ("sent", U64),
        ("received", U64),
        ("retransmits", U64),
        ("rtt", U64),
        ("timed", U64),
        ("duration", U64),
        ("last", U64),
    ]


class Counted(ctypes.Structure):
    """What is stored with the socket of a counted connection; `since` is CLOCK_MONOTONIC in ns, 0 once it is added."""

    _fields_ = [("key", FlowKey), ("since", U64), ("received", U64)]


class FlowSumsEntry(ctypes.Structure):
    """Value of flow_sums: all closed connections of a pod, and how its entries of flows came and did not."""

    _fields_ = [("outbound", FlowEntry), ("inbound", FlowEntry), ("added", U64), ("dropped", U64)]


class ShadowKey(ctypes.Structure):
    """Key of shadows: a connection of a shadow pod, or a query. Ports in host order; `way` is Way.OUT or Way.IN."""

    _fields_ = [
        ("cookie", U64),
        ("client", Address),
        ("server", Address),
        ("client_port", U16),
        ("server_port", U16),
        ("protocol", U16),
        ("way", U16),
    ]


class ShadowEntry(ctypes.Structure):
    """Value of shadows: what the programs would have done. `time` is CLOCK_MONOTONIC in ns."""

    _fields_ = [
        ("time", U64),
        ("verdict", U32),
        ("rule", U32),
        ("pid", U32),
        ("uid", U32),
        ("command", ctypes.c_char * 16),
    ]


class ShadowCountsEntry(ctypes.Structure):
    """Value of shadow_counts: what the programs could not record of a pod."""

    _fields_ = [("unnamed", U64), ("dropped", U64)]


class Uncompared(IntEnum):
    """Why the agent could not compare something: enum uncompared of maps.h."""

    NO_ENTRY = 0
    TPROXY = 1
    UNSEEN = 2
    UNNAMED = 3
    DROPPED = 4


class ShadowSumsEntry(ctypes.Structure):
    """Value of shadow_sums: what the agent has compared of a pod. Times are CLOCK_MONOTONIC in ns."""

    _fields_ = [
        ("since", U64),
        ("last", U64),
        ("same", U64),
        ("different", U64),
        ("not_compared", U64 * len(Uncompared)),
    ]


class FindingKey(ctypes.Structure):
    """Key of findings: one kind of difference. `went_to` is 0 if netfilter did not redirect. Ports in host order."""

    _fields_ = [
        ("cookie", U64),
        ("remote", Address),
        ("port", U16),
        ("protocol", U8),
        ("way", U8),
        ("verdict", U16),
        ("rule", U16),
        ("went_to", U16),
        ("zero16", U16),
        ("zero32", U32),
    ]


class FindingEntry(ctypes.Structure):
    """Value of findings. Times are CLOCK_MONOTONIC in ns; the process is the first one."""

    _fields_ = [
        ("count", U64),
        ("first", U64),
        ("last", U64),
        ("pid", U32),
        ("uid", U32),
        ("command", ctypes.c_char * 16),
    ]


class NodeEntry(ctypes.Structure):
    """Value of node: the node's settings that programs read."""

    _fields_ = [("acceleration", U32), ("wanted", U32), ("reason", ctypes.c_char * 248)]


class TracingEntry(ctypes.Structure):
    """Value of tracing: a reader wants the events of `cookie` (0: all pods) until `until` (CLOCK_MONOTONIC in ns)."""

    _fields_ = [("until", U64), ("cookie", U64)]


class EventKind(IntEnum):
    """Kinds of struct event."""

    CONNECT = 0
    INBOUND = 1
    LISTENING = 2
    CLOSED = 3
    KILLED = 4


class Event(ctypes.Structure):
    """An entry of the ring `events`. Ports are in host order; `time` is CLOCK_MONOTONIC in ns."""

    _fields_ = [
        ("time", U64),
        ("cookie", U64),
        ("kind", U32),
        ("verdict", U32),
        ("rule", U32),
        ("protocol", U32),
        ("pid", U32),
        ("uid", U32),
        ("source", Address),
        ("destination", Address),
        ("source_port", U16),
        ("destination_port", U16),
        ("command", ctypes.c_char * 16),
        ("signal", U32),
        ("sender", U32),
        ("zero32", U32),
    ]


class OpenerEntry(ctypes.Structure):
    """Who has opened a socket: ids of the initial user namespace, and the id of the cgroup2 directory."""

    _fields_ = [("uid", U32), ("gid", U32), ("cgroup", U64)]


class ZtunnelsEntry(ctypes.Structure):
    """Value of ztunnels: the ids of the cgroup2 directories of the node's ztunnels, then zeroes."""

    _fields_ = [("cgroup", U64 * ZTUNNELS)]


class KubeletEntry(ctypes.Structure):
    """Value of kubelet: the id of its cgroup2 directory, and the cookie of its network namespace."""

    _fields_ = [("cgroup", U64), ("netns", U64)]


class FoundListener(ctypes.Structure):
    """A listener that the iterator has found."""

    _fields_ = [
        ("socket", U64),
        ("opener", OpenerEntry),
        ("local", Address),
        ("family", U16),
        ("port", U16),
        ("mark", U32),
    ]


class ChoiceEntry(ctypes.Structure):
    """Value of choices: the listeners that the iterator is to store, by slot."""

    _fields_ = [("cookie", U64), ("socket", U64 * LISTENER_SLOTS)]


class BuildEntry(ctypes.Structure):
    """Value of build: the digest of the attached programs' sources, where they are attached, and extras they lack."""

    _fields_ = [("sources", U8 * 32), ("cgroup", ctypes.c_char * 256), ("lacking", ctypes.c_char * 128)]

    @property
    def extras_lacking(self) -> list[str]:
        """The names of the extras (extras.py) that the programs do without."""
        return [name for name in self.lacking.decode().split(",") if name]


class SteeringEntry(ctypes.Structure):
    """A pod's own program as it is compiled; see steering.py."""

    _fields_ = [
        ("instructions", U32),
        ("maps", U32),
        ("name", (ctypes.c_char * 16) * STEERING_MAPS),
        ("code", U64 * STEERING_INSTRUCTIONS),
    ]


class SteeredEntry(ctypes.Structure):
    """Which packet a pod's own program passes on, and the pod's netns cookie."""

    _fields_ = [("cookie", U64), ("remote", U32), ("remote_port", U16), ("local_port", U16)]


class Word(ctypes.Structure):
    """A plain 32-bit key or value."""

    _fields_ = [("word", U32)]


class Quad(ctypes.Structure):
    """A plain 64-bit value."""

    _fields_ = [("quad", U64)]


# the maps that user space opens, by name: the types of key and value. maps.h says who writes which map
TABLES: dict[str, tuple[type[ctypes.Structure], type[ctypes.Structure]]] = {
    "pods": (Cookie, PodEntry),
    "addresses": (AddressKey, OwnAddressEntry),
    "port_rules": (PortKey, Word),
    "networks": (NetworkKey, Word),
    "routes": (NetworkKey, RouteEntry),
    "interfaces": (InterfaceKey, Word),
    "proxies": (Cookie, Quad),
    "ztunnels": (Word, ZtunnelsEntry),
    "kubelet": (Word, KubeletEntry),
    "started": (Cookie, Word),
    "listeners": (ListenerKey, Quad),
    "handshakes": (ConnectionKey, DestinationEntry),
    "dials": (ConnectionKey, Word),
    "accelerated": (EndKey, Quad),
    "meetings": (Connection, MeetingEntry),
    "arrivals": (ConnectionKey, Quad),
    "traffic": (Cookie, TrafficEntry),
    "node": (Word, NodeEntry),
    "totals": (Word, Quad),
    "tallies": (Cookie, TallyEntry),
    "tracing": (Word, TracingEntry),
    "lost": (Word, Quad),
    "build": (Word, BuildEntry),
    "steering": (Word, SteeringEntry),
    "steered": (Word, SteeredEntry),
    "inbound": (Word, Word),
    "lost_handovers": (Cookie, Quad),
    "choices": (Word, ChoiceEntry),
    "uncaptured": (UncapturedKey, UncapturedEntry),
    "questions": (QuestionKey, Word),
    "coverage": (Cookie, CoverageEntry),
    "forgotten": (Cookie, Quad),
    "passages": (Word, Quad),
    "flows": (FlowKey, FlowEntry),
    "flow_sums": (Cookie, FlowSumsEntry),
    "flows_forgotten": (Cookie, Quad),
    "flow_totals": (Word, FlowEntry),
    "lifetimes": (Word, Quad),
    "shadows": (ShadowKey, ShadowEntry),
    "shadow_counts": (Cookie, ShadowCountsEntry),
    "shadow_sums": (Cookie, ShadowSumsEntry),
    "findings": (FindingKey, FindingEntry),
}

# enum total, in its order: the direction and verdict of connections of enrolled pods
TOTALS = (
    ("outbound", "direct"),
    ("outbound", "captured"),
    ("self", "captured"),
    ("dns", "captured"),
    ("outbound", "refused"),
    ("outbound", "unreachable"),
    ("inbound", "direct"),
    ("inbound", "captured"),
    ("inbound", "refused"),
    ("outbound", "denied"),
    ("inbound", "denied"),
)

# enum passage, in its order: way, and protocol or outcome
PASSAGES = (
    ("outbound", "tcp"),
    ("outbound", "udp"),
    ("outbound", "other"),
    ("inbound", "tcp"),
    ("inbound", "udp"),
    ("outbound", "refused"),
    ("inbound", "refused"),
)

# of maps.h
UNCAPTURED_PER_POD = 512
FLOWS_PER_POD = 512

# bounds of `lifetimes` in seconds, as lifetime_of() in flows.c has them; what was longer is counted after the last
LIFETIMES = (0.01, 0.1, 1, 10, 60, 600, 3600, 86400)

# enum rule of policy.h, in its order: the names in docs/semantics.md
RULES = (
    "",
    *("O0", "O1", "O2", "O3a", "O3b", "O3c", "O4a", "O4c", "O6", "O7", "O8", "O9", "O10", "O11"),
    *("I1", "I3", "I4", "I5"),
    "early-outbound",
    "deny",
    "no-route",
    "UDP",
    "no IPv6",
    "protocol",
    "late-outbound",
    *("A2", "A3", "A4", "A5", "A6", "A7"),
    *("B1", "B2", "B3"),
)

# maps that user space cannot look up by key, with the size of a value in bytes: socket storages, and the ring (0)
STORAGES = {"sockets": 48, "resolvers": 104, "pairings": 104, "counted": 48, "shadowed": 40, "events": 0}
