"""What both pods saw of each probe, held against each other, and against the reference decision."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from cni.policy.decision import Action, Inbound, Outbound, inbound, outbound
from tests.conformance.configs import Config
from tests.conformance.kinds import ADDRESSES, Probe
from tests.conformance.world import Seen

OWN = frozenset(
    ip_address(each) for name in ("own", "own2", "own-eth1", "own-eth1-by-eth0") for each in ADDRESSES[name]
)
# what connect() fails with by the route; these are the destinations with such a route
_ERRORS = {"unreachable": errno.EHOSTUNREACH, "prohibited": errno.EACCES, "blackhole": errno.EINVAL}
_ERRORS |= {"broadcast": errno.ENETUNREACH}
_BY_ROUTE = {ip_address(each): number for name, number in _ERRORS.items() for each in ADDRESSES[name] if each}
_LOCAL = frozenset(ip_address(each) for each in ADDRESSES["local-route"])
_ROUTED = frozenset(
    ip_address(each)
    for name in ("own", "own2", "own-eth1", "own-eth1-by-eth0", "peer", "beyond", "behind-eth1")
    for each in ADDRESSES[name]
)
_BY_ETH1 = frozenset(ip_address(each) for name in ("beyond", "behind-eth1") for each in ADDRESSES[name])
# what a client is told of a connection that has nowhere to go
UNREACHABLE = frozenset(map(os.strerror, (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL)))
Differing = dict[str, tuple[object, object]]  # what differs: with iptables, with sidestep
_CAPTURED: dict[str, Action] = {"E1": "proxy-outbound", "E6": "proxy-inbound", "D": "dns"}


@dataclass(frozen=True)
class Difference:
    """A probe that did not come out the same."""

    config: str
    probe: str
    iptables: str
    sidestep: str
    reason: str | None  # why that is intended; the heading in docs/differences.md


@dataclass(frozen=True)
class Intended:
    """A difference that is argued in docs/differences.md."""

    reason: str
    applies: Callable[[Config, Probe, Differing], bool]


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


INTENDED = (
    Intended("Several nameservers on one socket are told apart by aliases", _asks_under_an_alias),
    Intended("TPROXY works with lo excluded", _answers_without_lo),
    Intended("A port in use towards two destinations stays what it is", _keeps_its_port),
    Intended("Packets that a pod forwards are not captured", _is_forwarded),
)


def differences(config: Config, probe: Probe, iptables: Seen, sidestep: Seen) -> Difference | None:
    """How the two differ; None when they agree."""
    differing = {
        key: (iptables.get(key), sidestep.get(key))
        for key in iptables.keys() | sidestep.keys()
        if iptables.get(key) != sidestep.get(key)
    }
    if not differing:
        return None
    reason = next((each.reason for each in INTENDED if each.applies(config, probe, differing)), None)
    left, right = ("; ".join(f"{key} {pair[side]}" for key, pair in sorted(differing.items())) for side in (0, 1))
    return Difference(config.name, probe.name, left, right, reason)


def predicted(config: Config, probe: Probe) -> Action | None:
    """What the reference says; None where it says nothing: several destinations, or what the pod only forwards."""
    destination = ip_address(probe.destinations[0][0])
    plain = getattr(destination, "ipv4_mapped", None) or destination
    if len(probe.destinations) > 1 or (probe.place != "pod" and plain not in OWN):
        return None
    if plain.version == 6 and not config.captures_ipv6:
        return "pass"
    port = probe.destinations[0][1]
    if probe.place != "pod":
        if probe.protocol == "udp":
            return "pass"
        source = IPv4Address("10.20.0.1") if plain.version == 4 else IPv6Address("fd20::1")
        return inbound(config.policy, Inbound(port, source, OWN, "eth0" if probe.place == "peer" else "eth1")).action
    asked = Outbound(
        destination,
        port,
        ip_address(probe.source) if probe.source else None,
        *probe.opener,
        OWN,
        probe.protocol,
        "lo" if plain in _LOCAL else "eth1" if plain in _BY_ETH1 else "eth0",
        probe.mark,
        route_error=_error_to(config, probe, plain),
        does_loopback_stay=True,
    )
    return outbound(config.policy, asked).action


def _error_to(config: Config, probe: Probe, plain: IPv4Address | IPv6Address) -> int:
    """What the pod's route to an address leads to; without a default route, little has one."""
    if probe.device or probe.mark:
        return 0
    if plain.version in config.families and (plain in _BY_ROUTE or plain in _ROUTED):
        return _BY_ROUTE.get(plain, 0)
    return 0 if config.has_default_route and plain.version in config.families else errno.ENETUNREACH


def is_as_predicted(expected: Action, probe: Probe, seen: Seen) -> bool:
    """Whether who got it is whom the reference names. A proxy's own port looks the same captured and direct."""
    hit = seen["answers"][0]["hit"] if seen.get("answers") else seen["hit"]
    if probe.destinations[0][1] == {"E1": 15001, "E6": 15006, "D": 15053}.get(hit):
        return expected in ("pass", _CAPTURED[hit])
    if expected == "unreachable":
        return hit in UNREACHABLE
    return expected == _CAPTURED.get(hit, "pass")
