"""What both pods saw of each probe, held against each other, and against the reference decision."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from cni.policy import ambient_decision
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.decision import Action, Inbound, IPAddress, Outbound, inbound, outbound
from tests.conformance.configs import AmbientConfig, Config
from tests.conformance.parties import judging, party, plain
from tests.conformance.probe import ADDRESSES, Probe
from tests.conformance.world import Seen

# what connect() fails with by the route; these are the destinations with such a route
_ERRORS = {"unreachable": errno.EHOSTUNREACH, "prohibited": errno.EACCES, "blackhole": errno.EINVAL}
_ERRORS |= {"broadcast": errno.ENETUNREACH}
_BY_ROUTE = {plain(each): number for name, number in _ERRORS.items() for each in ADDRESSES[name] if each}
_LOCAL = frozenset(plain(each) for each in ADDRESSES["local-route"])
_BY_ETH1 = frozenset(plain(each) for name in ("beyond", "behind-eth1", "neighbour") for each in ADDRESSES[name])
_ROUTED = frozenset(plain(each) for each in ADDRESSES["peer"]) | _BY_ETH1
AnyConfig = Config | AmbientConfig
Differing = dict[str, tuple[object, object]]  # what differs: with Istio's rules, with sidestep


@dataclass(frozen=True)
class Difference:
    """A probe that did not come out the same."""

    config: str
    probe: str
    istio: str
    sidestep: str
    reason: str | None  # why that is intended; the heading in docs/differences.md


@dataclass(frozen=True)
class Intended:
    """A difference that is argued in docs/differences.md."""

    reason: str
    applies: Callable[[Any, Probe, Differing], bool]


def _keeps_its_port(config: Config, probe: Probe, differing: Differing) -> bool:
    """Only whether the second connection's port arrives as it is."""
    if set(differing) != {"each"}:
        return False
    left, right = differing["each"]
    assert isinstance(left, list) and isinstance(right, list)
    return [{**each, "is_port_kept": True} for each in left] == right


def _is_forwarded(config: Config, probe: Probe, differing: Differing) -> bool:
    return probe.kind == "transit"


def _asks_under_an_alias(config: Config, probe: Probe, differing: Differing) -> bool:
    """Only under which address the resolver sees the queries to the second nameserver and further ones."""
    if set(differing) != {"answers"} or len(probe.destinations) < 2:
        return False
    left, right = differing["answers"]
    assert isinstance(left, list) and isinstance(right, list)
    return left[0] == right[0] and [{**each, "source": None} for each in left] == [
        {**each, "source": None} for each in right
    ]


def _answers_without_lo(config: Config, probe: Probe, differing: Differing) -> bool:
    return probe.mark != 0 and "lo" in config.policy.exclude_interfaces


def _answers_without_inbound(config: Config, probe: Probe, differing: Differing) -> bool:
    return probe.mark != 0 and not (config.policy.inbound_all or config.policy.include_inbound_ports)


def _is_marked_by_others(config: AmbientConfig, probe: Probe, differing: Differing) -> bool:
    return probe.place == "pod" and probe.mark & 0xFFF in (0x539, 0x111)


def _answers_without_route(config: AmbientConfig, probe: Probe, differing: Differing) -> bool:
    return not config.has_default_route and probe.place == "ztunnel" and bool(probe.source)


BY_CONTAINER = Intended("ztunnel's mark alone does not lead past ztunnel", _is_marked_by_others)
AMBIENT_INTENDED = (
    Intended("Several nameservers on one socket are told apart by aliases", _asks_under_an_alias),
    Intended("Packets that a pod forwards are not captured", _is_forwarded),
    BY_CONTAINER,
    Intended("ztunnel reaches an application that has no route to the client", _answers_without_route),
)
INTENDED = (
    Intended("Several nameservers on one socket are told apart by aliases", _asks_under_an_alias),
    Intended("TPROXY works with lo excluded", _answers_without_lo),
    Intended("TPROXY works without inbound capture", _answers_without_inbound),
    Intended("A port in use towards two destinations stays what it is", _keeps_its_port),
    Intended("Packets that a pod forwards are not captured", _is_forwarded),
)


def _is_ipv6_by_halves(config: Config, probe: Probe, differing: Differing) -> bool:
    return plain(probe.destinations[0][0]).version == 6 and not judging(config, probe).captures_ipv6


# Only with rules that Istio's plugin has written with nft.
IN_NFTABLES_MODE = Intended(
    "Istio's nftables mode captures IPv6 that its iptables mode leaves alone", _is_ipv6_by_halves
)


def differences(
    config: AnyConfig, probe: Probe, istio: Seen, sidestep: Seen, intended: tuple[Intended, ...] = INTENDED
) -> Difference | None:
    """How the two differ; None when they agree. `intended` are the differences that have a reason."""
    differing = {
        key: (istio.get(key), sidestep.get(key))
        for key in istio.keys() | sidestep.keys()
        if istio.get(key) != sidestep.get(key)
    }
    if not differing:
        return None
    reason = next((each.reason for each in intended if each.applies(config, probe, differing)), None)
    left, right = ("; ".join(f"{key} {pair[side]}" for key, pair in sorted(differing.items())) for side in (0, 1))
    return Difference(config.name, probe.name, left, right, reason)


def predicted(config: AnyConfig, probe: Probe) -> Action | None:
    """What the reference says; None where it says nothing: several destinations, or what the pod only forwards."""
    pod, policy = party(probe), judging(config, probe).policy
    address, port = probe.destinations[0]
    destination = plain(address)
    if len(probe.destinations) > 1 or (probe.is_from_outside and destination not in pod.own):
        return None
    if destination.version == 6 and not judging(config, probe).captures_ipv6:
        return "pass"
    if probe.is_from_outside:
        if probe.protocol == "udp":
            return "pass"
        source = ip_address(pod.outside[probe.place, destination.version])
        arriving = Inbound(port, source, pod.own, pod.nics[probe.place])
        if isinstance(policy, AmbientPolicy):
            return ambient_decision.inbound(policy, arriving).action
        return inbound(policy, arriving).action
    asked = Outbound(
        destination,
        port,
        ip_address(probe.source) if probe.source else None,
        *probe.opener,
        pod.own,
        probe.protocol,
        "lo" if destination in _LOCAL else "eth1" if destination in _BY_ETH1 else "eth0",
        probe.mark,
        route_error=_error_to(config, probe, destination),
        container="other" if isinstance(policy, AmbientPolicy) and probe.place != "ztunnel" else "trusted",
        does_loopback_stay=True,
    )
    if isinstance(policy, AmbientPolicy):
        return ambient_decision.outbound(policy, asked).action
    return outbound(policy, asked).action


def _error_to(config: AnyConfig, probe: Probe, destination: IPAddress) -> int:
    """What the pod's route to an address leads to; without a default route, little has one."""
    if probe.device or probe.mark or probe.whose == "neighbour":
        return 0
    if destination.version in config.families and (
        destination in _BY_ROUTE or destination in party(probe).own | _ROUTED
    ):
        return _BY_ROUTE.get(destination, 0)
    return 0 if config.has_default_route and destination.version in config.families else errno.ENETUNREACH


def is_as_predicted(expected: Action, probe: Probe, seen: Seen) -> bool:
    """Whether who got it is whom the reference names."""
    hit = seen["answers"][0]["hit"] if seen.get("answers") else seen["hit"]
    return expected in party(probe).takes(hit, probe.destinations[0][1])


def is_fast(seen: Seen) -> bool:
    """Whether the last connection of a probe brought data with its SYN, as TCP Fast Open does once it has a cookie."""
    return bool(seen.get("each") and seen["each"][-1]["syn_data"])
