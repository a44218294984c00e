"""Turns the policy and sandbox of a pod in ambient mode into its map entries. Pure, as entries.py."""

from bpf.layout import Level, PodFlags
from cni.enrolment.entries import Entries, Identity, sandbox_flags
from cni.enrolment.terms import Terms, flags_of
from cni.netns.sandbox import Sandbox
from cni.policy.ambient_policy import AmbientPolicy

# (uid_t)-1, which no process can have (user_namespaces(7)): such a pod has no proxy that is known by its ids
_NOBODY = 0xFFFFFFFF


def ambient_flags(policy: AmbientPolicy) -> PodFlags:
    """The flags that a policy asks for."""
    return PodFlags.AMBIENT | flags_of(
        (PodFlags.IPV6, policy.ipv6),
        (PodFlags.DNS, policy.dns_capture),
        (PodFlags.BYPASS_INBOUND, policy.bypass_inbound_capture),
        (PodFlags.TRUSTS_MARK, policy.trust_mark),
    )


def ambient_entries_of(identity: Identity, policy: AmbientPolicy, sandbox: Sandbox) -> Entries:
    """The entries that a pod in ambient mode should have.

    It is never accelerated: both ends of what could be are one process, ztunnel.
    """
    return Entries(
        identity=identity,
        flags=ambient_flags(policy) | flags_of(*sandbox_flags(sandbox)),
        proxy_uid=_NOBODY,
        proxy_gid=_NOBODY,
        acceleration=Level.OFF,
        excluded_interfaces=(),
        terms=Terms(PodFlags(0), {}, {}),
        sandbox=sandbox,
    )


def ambient_policy_of_flags(flags: PodFlags) -> AmbientPolicy:
    """The policy of an enrolled pod, by the flags of its map entry."""
    return AmbientPolicy(
        dns_capture=PodFlags.DNS in flags,
        bypass_inbound_capture=PodFlags.BYPASS_INBOUND in flags,
        ipv6=PodFlags.IPV6 in flags,
        trust_mark=PodFlags.TRUSTS_MARK in flags,
    )
