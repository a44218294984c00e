"""Reads the enrolled pods from the maps. The programs go by the maps, whatever the Pods' annotations say now."""

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from bpf import links
from bpf.layout import INBOUND_PORT, Cookie, Level, NetworkKey, NetworkVerdict, PodEntry, PodFlags, PortRule, RouteEntry
from bpf.pins import Pins
from bpf.tables import Table, Tables
from cni.enrolment.entries import Identity, excluded_interfaces_of, on_uncaptured
from cni.policy.annotations import ALWAYS_EXCLUDED_INBOUND, CapturePolicy, Network
from cni.policy.decision import IPAddress
from installer.commands.names import NoSuchPod, cookie_of

_LO = 1


@dataclass(frozen=True)
class EnrolledPod:
    """One pod. `policy` is the policy of its annotations as far as the maps keep it: everything that has an effect."""

    cookie: int
    inode: int  # of its network namespace; 0 if that has gone, or if its link was detached
    entry: PodEntry
    policy: CapturePolicy
    addresses: frozenset[IPAddress]
    excluded: frozenset[int]  # interface indices
    inbound_listeners: int
    has_started: bool  # whether its proxy has listened on 15001; known only of pods with early or late outbound
    proxy_cgroup: int | None  # cgroup id of a strict pod's proxy container; None until it is known

    @property
    def identity(self) -> Identity:
        """Which pod it is: its name, its UID, and how it was enrolled."""
        return Identity.of(self.entry)

    @property
    def flags(self) -> PodFlags:
        """The pod's flags, which the programs read first."""
        return PodFlags(self.entry.flags)

    @property
    def is_ipv6_captured(self) -> bool:
        """Whether the pod's IPv6 is captured."""
        return PodFlags.IPV6 in self.flags

    def route_to(self, tables: Tables, ip: IPAddress) -> RouteEntry | None:
        """What the programs know of the pod's route to an address; None if they know nothing of it."""
        return tables.routes.get(NetworkKey.of(self.cookie, ip_network(ip)))

    def deciding(self, names: Mapping[int, str]) -> CapturePolicy:
        """The policy that decides: its excluded interfaces are those in the maps, named by interface_name()."""
        excluded = tuple(interface_name(index, names) for index in sorted(self.excluded))
        return self.policy.model_copy(update={"exclude_interfaces": excluded})


def interface_name(index: int, names: Mapping[int, str]) -> str:
    """The name of an interface, or "interface INDEX" if its name is unknown."""
    return "lo" if index == _LO else names.get(index, f"interface {index}")


def every(pins: Pins, tables: Tables) -> list[EnrolledPod]:
    """All enrolled pods, sorted by name."""
    return _read(pins, tables, dict(_entries(tables)))


def find_pod(pins: Pins, tables: Tables, name: str) -> EnrolledPod:
    """The pod called NAME or NAMESPACE/NAME. Raises NoSuchPod."""
    cookie = cookie_of(tables, name)
    entry = tables.pods.get(Cookie(cookie))
    if entry is None:
        raise NoSuchPod(f"{name} has gone just now")
    return _read(pins, tables, {cookie: entry})[0]


def _entries(tables: Tables) -> Iterator[tuple[int, PodEntry]]:
    """The entries of pods whose enrolment is complete."""
    return ((key.cookie, pod) for key, pod in tables.pods.every() if pod.name)


def _read(pins: Pins, tables: Tables, entries: dict[int, PodEntry]) -> list[EnrolledPod]:
    """The pods of these entries. Each table is walked once, however many pods there are."""
    some = entries.keys()

    def with_flag(flag: PodFlags) -> set[int]:
        return {cookie for cookie in some if entries[cookie].flags & flag}

    rules = _in_force(entries, _grouped(tables.port_rules, with_flag(PodFlags.PORT_RULES)))
    networks = _in_force(entries, _grouped(tables.networks, with_flag(PodFlags.NETWORKS)))
    interfaces = _grouped(tables.interfaces, with_flag(PodFlags.INTERFACES))
    listeners = _grouped(tables.listeners, some)
    addresses: dict[int, set[IPAddress]] = {}
    for key in tables.addresses.every_key():
        addresses.setdefault(key.cookie, set()).add(key.address.ip())
    inodes = dict(links.linked_pods(pins))
    found = []
    for cookie, entry in entries.items():
        proxy = tables.proxies.get(Cookie(cookie))
        ports = {key.port: PortRule(value.word) for key, value in rules.get(cookie, ())}
        ranges = {key.network: NetworkVerdict(value.word) for key, value in networks.get(cookie, ())}
        found.append(
            EnrolledPod(
                cookie=cookie,
                inode=inodes.get(cookie, 0),
                entry=entry,
                policy=_policy(entry, ports, ranges),
                addresses=frozenset(addresses.get(cookie, ())),
                excluded=frozenset(key.ifindex for key, _ in interfaces.get(cookie, ())),
                inbound_listeners=sum(key.port == INBOUND_PORT for key, _ in listeners.get(cookie, ())),
                has_started=tables.started.get(Cookie(cookie)) is not None,
                proxy_cgroup=proxy.quad if proxy else None,
            )
        )
    return sorted(found, key=lambda each: str(each.identity))


def _grouped(table: Table[Any, Any], cookies: Iterable[int]) -> dict[int, list[tuple[Any, Any]]]:
    """The entries of some pods, by pod. Values of other pods are not even read."""
    wanted = frozenset(cookies)
    found: dict[int, list[tuple[Any, Any]]] = {}
    for key in table.every_key() if wanted else ():
        if key.cookie in wanted and (value := table.get(key)) is not None:
            found.setdefault(key.cookie, []).append((_copy(key), value))
    return found


def _in_force(
    entries: Mapping[int, PodEntry], grouped: Mapping[int, list[tuple[Any, Any]]]
) -> dict[int, list[tuple[Any, Any]]]:
    """Those rows that carry the number of their pod's policy: others are being written or removed."""
    return {
        cookie: [(key, value) for key, value in some if key.policy == entries[cookie].policy]
        for cookie, some in grouped.items()
    }


def _copy(key: ctypes.Structure) -> ctypes.Structure:
    return type(key).from_buffer_copy(key)


def _policy(
    entry: PodEntry, ports: Mapping[int, PortRule], networks: Mapping[Network, NetworkVerdict]
) -> CapturePolicy:
    flags = PodFlags(entry.flags)

    def with_rule(rule: PortRule) -> frozenset[int]:
        return frozenset(port for port, rules in ports.items() if rules & rule)

    def with_verdict(verdict: NetworkVerdict) -> tuple[Network, ...]:
        some = (network for network, found in networks.items() if found == verdict)
        return tuple(sorted(some, key=order))

    inbound_all = PodFlags.INBOUND_ALL in flags
    return CapturePolicy(
        mode="TPROXY" if PodFlags.TPROXY in flags else "REDIRECT",
        outbound_all=PodFlags.OUTBOUND_ALL in flags,
        include_outbound=with_verdict(NetworkVerdict.INCLUDED),
        exclude_outbound=with_verdict(NetworkVerdict.EXCLUDED),
        include_outbound_ports=with_rule(PortRule.INCLUDE_OUTBOUND),
        exclude_outbound_ports=with_rule(PortRule.EXCLUDE_OUTBOUND),
        inbound_all=inbound_all,
        include_inbound_ports=with_rule(PortRule.INCLUDE_INBOUND),
        exclude_inbound_ports=with_rule(PortRule.EXCLUDE_INBOUND) if inbound_all else ALWAYS_EXCLUDED_INBOUND,
        exclude_interfaces=excluded_interfaces_of(entry),
        proxy_uid=entry.proxy_uid,
        proxy_gid=entry.proxy_gid,
        dns_capture=PodFlags.DNS in flags,
        dual_stack=PodFlags.IPV6 in flags,
        loopback_included=PodFlags.LOOPBACK_INCLUDED in flags,
        early_outbound=PodFlags.EARLY_OUTBOUND in flags,
        late_outbound=PodFlags.LATE_OUTBOUND in flags,
        strict_proxy=PodFlags.STRICT in flags,
        deny_outbound_ports=with_rule(PortRule.DENY_OUTBOUND) if PodFlags.DENIES in flags else frozenset(),
        deny_inbound_ports=with_rule(PortRule.DENY_INBOUND) if PodFlags.DENIES in flags else frozenset(),
        uncaptured=on_uncaptured(flags),
        live=PodFlags.LIVE_POLICY in flags,
        acceleration=Level(entry.acceleration),
    )


def order(network: Network) -> tuple[int, int, int]:
    """The sort key of effective_prefixes(): IPv4 first, then by address."""
    return network.version, int(network.network_address), network.prefixlen
