"""Turns a pod's policy and sandbox into its map entries. Pure, so that CHECK compares with what ADD writes."""

import ctypes
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from bpf.layout import Address, Level, NetworkVerdict, PodEntry, PodFlags, PortRule
from cni.errors import RegistrationFailed
from cni.netns.sandbox import Sandbox
from cni.policy.annotations import CapturePolicy, Network, OnUncaptured
from cni.policy.prefixes import effective_prefixes

# Joins interface names in an entry. Istio's syntax allows no comma in a name (the kernel's dev_valid_name does).
_SEPARATOR = ","


@dataclass(frozen=True)
class Identity:
    """The pod and the CNI attachment that an entry belongs to."""

    uid: str
    name: str
    namespace: str
    container_id: str
    network: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def is_adopted(self) -> bool:
        """Whether the pod was enrolled while it ran. An ADD would have given the name of its network."""
        return not self.network

    @classmethod
    def of(cls, pod: PodEntry) -> "Identity":
        """The identity in a pod's map entry."""
        return cls(*(getattr(pod, field).decode() for field in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Entries:
    """What one pod has in the tables, as plain values."""

    identity: Identity
    flags: PodFlags
    proxy_uid: int  # in the initial user namespace, like proxy_gid
    proxy_gid: int
    acceleration: Level
    excluded_interfaces: tuple[str, ...]
    port_rules: dict[int, PortRule]
    networks: dict[Network, NetworkVerdict]
    sandbox: Sandbox  # the part that changes with the namespace

    def pod(self) -> PodEntry:
        """The pod's own entry, for the table pods. Raises RegistrationFailed if a name does not fit its field."""
        pod = PodEntry(
            flags=self.flags,
            proxy_uid=self.proxy_uid,
            proxy_gid=self.proxy_gid,
            port_rules=len(self.port_rules),
            networks=len(self.networks),
            acceleration=self.acceleration,
            source4=Address.of(self.sandbox.source(4)),
            source6=Address.of(self.sandbox.source(6)),
        )
        texts = {field: getattr(self.identity, field) for field in Identity.__dataclass_fields__}
        texts["excluded_interfaces"] = _SEPARATOR.join(self.excluded_interfaces)
        for field, text in texts.items():
            raw = text.encode()
            room = ctypes.sizeof(dict(PodEntry._fields_)[field])  # type: ignore[arg-type]
            if len(raw) >= room:
                raise RegistrationFailed(f'{field} "{text}" has {len(raw)} bytes; at most {room - 1} fit')
            setattr(pod, field, raw)
        return pod


def entries_of(identity: Identity, policy: CapturePolicy, sandbox: Sandbox, ids: tuple[int, int]) -> Entries:
    """The entries that a pod should have. `ids` are the proxy's uid and gid in the initial user namespace."""
    port_rules = _port_rules(policy)
    networks = {
        prefix.network: NetworkVerdict.EXCLUDED if prefix.verdict == "exclude" else NetworkVerdict.INCLUDED
        for prefix in effective_prefixes(policy)
    }
    flags = PodFlags(0)
    for flag, wanted in (
        (PodFlags.IPV6, sandbox.captures_ipv6(policy.dual_stack)),
        (PodFlags.OUTBOUND_ALL, policy.outbound_all),
        (PodFlags.INBOUND_ALL, policy.inbound_all),
        (PodFlags.PORT_RULES, port_rules),
        (PodFlags.NETWORKS, networks),
        (PodFlags.LOOPBACK_INCLUDED, policy.loopback_included),
        (PodFlags.INTERFACES, policy.exclude_interfaces),
        (PodFlags.DNS, policy.dns_capture),
        (PodFlags.TPROXY, policy.mode == "TPROXY"),
        (PodFlags.EARLY_OUTBOUND, policy.early_outbound),
        (PodFlags.STRICT, policy.strict_proxy),
        (PodFlags.ROUTES, sandbox.ways),
        (PodFlags.LOOPBACK_STAYS, sandbox.loopback_stays),
        (PodFlags.UNCAPTURED_DENIED, policy.uncaptured == "deny"),
        (PodFlags.UNCAPTURED_AUDITED, policy.uncaptured == "audit"),
        (PodFlags.DENIES, policy.deny_outbound_ports | policy.deny_inbound_ports),
    ):
        if wanted:
            flags |= flag
    return Entries(
        identity=identity,
        flags=flags,
        proxy_uid=ids[0],
        proxy_gid=ids[1],
        acceleration=policy.acceleration,
        excluded_interfaces=tuple(dict.fromkeys(policy.exclude_interfaces)),
        port_rules=port_rules,
        networks=networks,
        sandbox=sandbox,
    )


def on_uncaptured(flags: PodFlags) -> OnUncaptured:
    """What an enrolled pod asks for about what is not captured, by the flags of its map entry."""
    if PodFlags.UNCAPTURED_DENIED in flags:
        return "deny"
    return "audit" if PodFlags.UNCAPTURED_AUDITED in flags else "allow"


def excluded_interfaces_of(pod: PodEntry) -> tuple[str, ...]:
    """The names of the interfaces that an enrolled pod excludes, from its map entry."""
    text = pod.excluded_interfaces.decode()
    return tuple(text.split(_SEPARATOR)) if text else ()


def _port_rules(policy: CapturePolicy) -> dict[int, PortRule]:
    rules: dict[int, PortRule] = {}
    lists = [
        (policy.exclude_outbound_ports, PortRule.EXCLUDE_OUTBOUND),
        (policy.include_outbound_ports, PortRule.INCLUDE_OUTBOUND),
        # Istio reads the exclude list only when everything is included
        (policy.exclude_inbound_ports, PortRule.EXCLUDE_INBOUND)
        if policy.inbound_all
        else (policy.include_inbound_ports, PortRule.INCLUDE_INBOUND),
    ]
    for ports, rule in lists:
        for port in ports:
            rules[port] = rules.get(port, PortRule(0)) | rule
    return with_denied(rules, denial(policy.deny_outbound_ports, policy.deny_inbound_ports))


def denial(outbound: Collection[int], inbound: Collection[int]) -> dict[int, PortRule]:
    """Port rules that deny these ports and say nothing else. Ports are in host order."""
    rules = dict.fromkeys(outbound, PortRule.DENY_OUTBOUND)
    for port in inbound:
        rules[port] = rules.get(port, PortRule(0)) | PortRule.DENY_INBOUND
    return rules


def with_denied(rules: Mapping[int, PortRule], denied: Mapping[int, PortRule]) -> dict[int, PortRule]:
    """A copy of `rules` in which the ports of `denied` are denied and no others."""
    kept = {port: rule & ~(PortRule.DENY_OUTBOUND | PortRule.DENY_INBOUND) for port, rule in rules.items()}
    made = {port: kept.get(port, PortRule(0)) | denied.get(port, PortRule(0)) for port in {*kept, *denied}}
    return {port: rule for port, rule in made.items() if rule}
