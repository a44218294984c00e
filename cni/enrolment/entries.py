"""Turns a pod's policy and sandbox into its map entries. Pure, so that CHECK compares with what ADD writes."""

import ctypes
from dataclasses import dataclass

from bpf.layout import Address, Level, PodEntry, PodFlags
from cni.enrolment.terms import Terms, flags_of, terms_of
from cni.errors import RegistrationFailed
from cni.netns.sandbox import Sandbox
from cni.policy.annotations import CapturePolicy, OnUncaptured

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
    terms: Terms
    sandbox: Sandbox  # the part that changes with the namespace

    def pod(self, policy: int = 0) -> PodEntry:
        """The pod's own entry, for the table pods. `policy` is the number under which its terms are in the maps.

        Raises RegistrationFailed if a name does not fit its field.
        """
        pod = PodEntry(
            flags=self.flags,
            policy=policy,
            proxy_uid=self.proxy_uid,
            proxy_gid=self.proxy_gid,
            port_rules=len(self.terms.port_rules),
            networks=len(self.terms.networks),
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


def sandbox_flags(sandbox: Sandbox) -> tuple[tuple[PodFlags, bool], ...]:
    """The flags that change with the pod's namespace, each with whether the pod has it."""
    return (PodFlags.ROUTES, bool(sandbox.ways)), (PodFlags.LOOPBACK_STAYS, sandbox.loopback_stays)


def entries_of(identity: Identity, policy: CapturePolicy, sandbox: Sandbox, ids: tuple[int, int]) -> Entries:
    """The entries that a pod should have. `ids` are the proxy's uid and gid in the initial user namespace."""
    terms = terms_of(policy)
    flags = terms.flags | flags_of(
        (PodFlags.IPV6, sandbox.captures_ipv6(policy.dual_stack)),
        (PodFlags.INTERFACES, policy.exclude_interfaces),
        (PodFlags.DNS, policy.dns_capture),
        (PodFlags.TPROXY, policy.mode == "TPROXY"),
        (PodFlags.EARLY_OUTBOUND, policy.early_outbound),
        (PodFlags.LATE_OUTBOUND, policy.late_outbound),
        (PodFlags.STRICT, policy.strict_proxy),
        *sandbox_flags(sandbox),
    )
    return Entries(
        identity=identity,
        flags=flags,
        proxy_uid=ids[0],
        proxy_gid=ids[1],
        acceleration=policy.acceleration,
        excluded_interfaces=tuple(dict.fromkeys(policy.exclude_interfaces)),
        terms=terms,
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
