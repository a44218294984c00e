"""What one pod's policy and sandbox become in the maps: pure, so that ADD writes and CHECK compares the same thing."""

import ctypes
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from bpf.layout import Address, NetworkVerdict, Pod, PodFlags, PortRule
from cni.annotations import CapturePolicy
from cni.errors import RegistrationFailed
from cni.prefixes import effective_prefixes
from cni.sandbox import Sandbox


@dataclass(frozen=True)
class Identity:
    """Which pod and which attachment an entry belongs to; every field has the length its map field allows."""

    uid: str
    name: str
    namespace: str
    container_id: str
    network: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @classmethod
    def of(cls, pod: Pod) -> "Identity":
        """Read back from a map entry."""
        return cls(*(getattr(pod, field).decode() for field in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Entries:
    """One pod's part of each table, by plain values."""

    identity: Identity
    flags: PodFlags
    proxy_uid: int
    proxy_gid: int
    source4: IPv4Address | None
    source6: IPv6Address | None
    addresses: dict[IPv4Address | IPv6Address, int]
    port_rules: dict[int, PortRule]
    networks: dict[IPv4Network | IPv6Network, NetworkVerdict]

    def pod(self) -> Pod:
        """The value of the pods table. Raises RegistrationFailed when a name does not fit its field."""
        pod = Pod(
            flags=self.flags,
            proxy_uid=self.proxy_uid,
            proxy_gid=self.proxy_gid,
            addresses=len(self.addresses),
            port_rules=len(self.port_rules),
            networks=len(self.networks),
            source4=Address.of(self.source4),
            source6=Address.of(self.source6),
        )
        for field in Identity.__dataclass_fields__:
            raw = getattr(self.identity, field).encode()
            room = ctypes.sizeof(dict(Pod._fields_)[field])  # type: ignore[arg-type]
            if len(raw) >= room:
                raise RegistrationFailed(
                    f'{field} "{raw.decode()}" has {len(raw)} bytes; at most {room - 1} are possible'
                )
            setattr(pod, field, raw)
        return pod


def entries_of(identity: Identity, policy: CapturePolicy, sandbox: Sandbox) -> Entries:
    """What the maps should say about a pod."""
    port_rules = _port_rules(policy)
    networks = {
        prefix.network: NetworkVerdict.EXCLUDED if prefix.verdict == "exclude" else NetworkVerdict.INCLUDED
        for prefix in effective_prefixes(policy)
    }
    ipv6 = sandbox.captures_ipv6(policy.dual_stack)
    flags = PodFlags(0)
    for flag, wanted in (
        (PodFlags.IPV6, ipv6),
        (PodFlags.OUTBOUND_ALL, policy.outbound_all),
        (PodFlags.INBOUND_ALL, policy.inbound_all),
        (PodFlags.PORT_RULES, port_rules),
        (PodFlags.NETWORKS, networks),
        (PodFlags.LOOPBACK_INCLUDED, policy.loopback_included),
    ):
        if wanted:
            flags |= flag
    source4, source6 = sandbox.routable(4), sandbox.routable(6)
    return Entries(
        identity=identity,
        flags=flags,
        proxy_uid=policy.proxy_uid,
        proxy_gid=policy.proxy_gid,
        source4=source4 if isinstance(source4, IPv4Address) else None,
        source6=source6 if isinstance(source6, IPv6Address) else None,
        addresses={address.ip: address.ifindex for address in sandbox.addresses},
        port_rules=port_rules,
        networks=networks,
    )


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
    return rules
