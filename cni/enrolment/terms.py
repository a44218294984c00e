"""The part of a pod's entries that may change while the pod runs: what its annotations say of ports and ranges.

A pod's policy is in force as a whole or not at all. So its terms are worked out as a value first, and then written
under a number of their own (enroll.py). Pure.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from bpf.layout import NetworkVerdict, PodFlags, PortRule
from cni.policy.annotations import CapturePolicy, Network
from cni.policy.prefixes import effective_prefixes

_DENY = PortRule.DENY_OUTBOUND | PortRule.DENY_INBOUND
# the flags that follow the Pod; a pod's other flags come from its namespace or its proxy, or are fixed at its ADD
FLAGS = (
    PodFlags.OUTBOUND_ALL
    | PodFlags.INBOUND_ALL
    | PodFlags.PORT_RULES
    | PodFlags.NETWORKS
    | PodFlags.LOOPBACK_INCLUDED
    | PodFlags.DENIES
    | PodFlags.UNCAPTURED_DENIED
    | PodFlags.UNCAPTURED_AUDITED
    | PodFlags.LIVE_POLICY
    | PodFlags.DELETED
)


@dataclass(frozen=True)
class Terms:
    """Flags (of FLAGS alone), rules by port in host order, and the verdict on each range."""

    flags: PodFlags
    port_rules: Mapping[int, PortRule]
    networks: Mapping[Network, NetworkVerdict]

    @property
    def denied(self) -> dict[int, PortRule]:
        """The ports that are denied, with nothing else that is said of them."""
        return {port: rule & _DENY for port, rule in self.port_rules.items() if rule & _DENY}

    def denying(self, denied: Mapping[int, PortRule]) -> "Terms":
        """The same terms, in which the ports of `denied` are denied and no others."""
        kept = {port: rule & ~_DENY for port, rule in self.port_rules.items()}
        both = {port: kept.get(port, PortRule(0)) | denied.get(port, PortRule(0)) for port in {*kept, *denied}}
        rules = {port: rule for port, rule in both.items() if rule}
        made = replace(self, port_rules=rules).flagged(PodFlags.PORT_RULES, bool(rules))
        return made.flagged(PodFlags.DENIES, bool(denied))

    def flagged(self, flag: PodFlags, wanted: bool) -> "Terms":
        """The same terms with or without a flag."""
        return replace(self, flags=self.flags | flag if wanted else self.flags & ~flag)


def flags_of(*wanted: tuple[PodFlags, object]) -> PodFlags:
    """The flags that stand beside something true."""
    return PodFlags(sum(flag for flag, is_wanted in wanted if is_wanted))


def terms_of(policy: CapturePolicy) -> Terms:
    """The terms that a policy asks for."""
    networks = {
        prefix.network: NetworkVerdict.EXCLUDED if prefix.verdict == "exclude" else NetworkVerdict.INCLUDED
        for prefix in effective_prefixes(policy)
    }
    rules = _port_rules(policy)
    flags = flags_of(
        (PodFlags.OUTBOUND_ALL, policy.outbound_all),
        (PodFlags.INBOUND_ALL, policy.inbound_all),
        (PodFlags.PORT_RULES, rules),
        (PodFlags.NETWORKS, networks),
        (PodFlags.LOOPBACK_INCLUDED, policy.loopback_included),
        (PodFlags.UNCAPTURED_DENIED, policy.uncaptured == "deny"),
        (PodFlags.UNCAPTURED_AUDITED, policy.uncaptured == "audit"),
        (PodFlags.LIVE_POLICY, policy.live),
    )
    captured = Terms(flags, rules, networks)
    return captured.denying(denial(policy.deny_outbound_ports, policy.deny_inbound_ports))


def denial(outbound: Collection[int], inbound: Collection[int]) -> dict[int, PortRule]:
    """Port rules that deny these ports and say nothing else. Ports are in host order."""
    rules = dict.fromkeys(outbound, PortRule.DENY_OUTBOUND)
    for port in inbound:
        rules[port] = rules.get(port, PortRule(0)) | PortRule.DENY_INBOUND
    return rules


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
