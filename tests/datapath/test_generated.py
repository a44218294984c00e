"""Generated Pods and connections: the running programs decide each as cni/policy/decision.py does.

Annotations are drawn, made a policy and enrolled; then connections of any user, source, family and destination are made
in the pod and to it, and who answers tells the verdict. 1,000 connections by default;
HYPOTHESIS_EXAMPLES=10000 makes that many. What only sidestep has (early outbound, strict proxies) has tests of its own.
"""

import os
import re
from collections import Counter
from ipaddress import IPv4Address, IPv6Address, ip_address
from random import Random
from typing import Any, Literal, NamedTuple

from cni.policy import annotations
from cni.policy.annotations import CapturePolicy, policy_of
from cni.policy.decision import TPROXY_MARK, Inbound, IPAddress, Outbound, Verdict, inbound, outbound
from cni.policy.pod import Pod
from tests.datapath.probing import OUTSIDE4, OUTSIDE6, PORTS, UDP_PORTS, Case, Surroundings
from tests.datapath.wires import Wire

EACH = 20  # connections a Pod
CONNECTIONS = int(os.environ.get("HYPOTHESIS_EXAMPLES", "1000"))

PEER4, PEER6 = IPv4Address("10.9.0.1"), IPv6Address("fd99::1")
OWN4, OWN6 = IPv4Address("10.9.0.2"), IPv6Address("fd99::2")
LOOPBACK4, LOOPBACK6 = [*map(ip_address, ("127.0.0.1", "127.0.0.6"))], [*map(ip_address, ("::1", "::6"))]
OWN: frozenset[IPAddress] = frozenset((OWN4, OWN6))
IDS = (0, 1000, 1337, 2000)
NETWORKS = re.findall(
    r"\S+",
    """
    0.0.0.0/0 0.0.0.0/1 10.0.0.0/8 10.9.0.0/24 10.9.0.1/32 10.9.0.2/32
    203.0.113.0/24 203.0.113.128/25 203.0.113.200/29 203.0.113.201/32 198.51.0.0/16
    127.0.0.0/8 127.0.0.1/32 127.0.0.5/32 127.64.0.0/10
    ::/0 ::1/128 fd00::/8 fd99::/64 fd99::1/128 fd99::2/128 fd73:6964:6573:7465::/64
    2001:db8::/32 2001:db8:1::/48 2001:db8:1::/64 2001:db8:1::7/128
    ::ffff:203.0.113.0/120 ::ffff:127.0.0.1/128
    """,
)
PLACES: dict[int, list[IPAddress]] = {
    4: [*map(ip_address, ("203.0.113.7", "203.0.113.201", "198.51.100.7"))],
    6: [*map(ip_address, ("2001:db8:1::7", "2001:db8:2::7", "2001:db8:1:1::7"))],
}
PLACES[4] += [PEER4, OWN4, OWN4, *map(ip_address, ("127.0.0.1", "127.0.0.5", "127.0.0.6", "127.64.1.2", "0.0.0.0"))]
PLACES[6] += [PEER6, OWN6, OWN6, *map(ip_address, ("::1", "::6", "fd73:6964:6573:7465::7", "::"))]

# a generator that never gets to a rule shows nothing about it
RULES = {"O0", "O1", "O2", "O3a", "O3b", "O3c", "O4a", "O4c", "O6", "O7", "O8", "O9", "O10", "O11", "T"}
RULES |= {"I1", "I2", "I3", "I4", "I5", "no IPv6", "no-route"}


class Drawn(NamedTuple):
    """A Pod, and connections to try with it."""

    pod: Pod
    policy: CapturePolicy
    cases: list[Case]
    fresh: bool  # or enrolled over the one before


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(seed: int) -> Drawn:
    """Everything about one Pod; the same for the same number. What is rare among Pods is not rare here."""
    rng = Random(seed)
    values = {
        annotations.INTERCEPTION_MODE: rng.choice(("REDIRECT", "TPROXY")),
        annotations.INCLUDE_OUTBOUND_RANGES: rng.choice((ranges(rng), f"127.0.0.0/8,::1/128,{ranges(rng)}", "", "*")),
        annotations.EXCLUDE_OUTBOUND_RANGES: rng.choice((ranges(rng), "")),
        annotations.INCLUDE_OUTBOUND_PORTS: ports(rng),
        annotations.EXCLUDE_OUTBOUND_PORTS: ports(rng),
        annotations.INCLUDE_INBOUND_PORTS: rng.choice((ports(rng), "", "*", "*")),
        annotations.EXCLUDE_INBOUND_PORTS: ports(rng),
        annotations.EXCLUDE_INTERFACES: rng.choice((*[""] * 6, "eth0", "lo", "lo,eth0", "net9")),
    }
    dns, dual_stack = rng.choice(("true", "false")), rng.choice(("true", "true", "true", "false"))
    proxy = {
        "name": "istio-proxy",
        "env": [{"name": annotations.DNS_CAPTURE, "value": dns}, {"name": annotations.DUAL_STACK, "value": dual_stack}],
        "securityContext": {"runAsUser": rng.choice((None, *IDS)), "runAsGroup": rng.choice((None, *IDS))},
    }
    texts = {key: text for key, text in values.items() if rng.random() < 0.6}
    pod = Pod.model_validate({"metadata": {"name": "pod", "annotations": texts}, "spec": {"containers": [proxy]}})
    policy = policy_of(pod)
    cases = [outgoing(rng, policy) if rng.random() < 0.75 else incoming(rng) for _ in range(EACH)]
    return Drawn(pod, policy, cases, fresh=rng.random() < 0.5)


def ranges(rng: Random) -> str:
    return ",".join(rng.sample(NETWORKS, rng.randint(1, 5)))


def ports(rng: Random) -> str:
    return ",".join(map(str, rng.sample(PORTS, rng.randint(0, 4))))


def outgoing(rng: Random, policy: CapturePolicy) -> Case:
    """A connection or datagram of somebody in the pod."""
    family: Literal["4", "6", "mapped"] = rng.choice(("4", "6", "mapped"))
    is_ipv6 = family == "6"
    destination = destination_of(rng, policy, 6 if is_ipv6 else 4)
    local, udp = is_local(destination), rng.random() < 0.15
    sources = [None, None, None, OWN6 if is_ipv6 else OWN4]
    # IPv6 lets ::1 out of the pod, and nobody could answer; IPv4 says so at once
    if not udp and (local or not is_ipv6):
        sources += LOOPBACK6 if is_ipv6 else LOOPBACK4
    asked = Outbound(
        destination,
        rng.choice(UDP_PORTS if udp else PORTS),
        rng.choice(sources),
        rng.choice((*IDS, 1000, policy.proxy_uid)),
        rng.choice((*IDS, 1000, policy.proxy_gid)),
        OWN,
        "udp" if udp else "tcp",
        None if local else "eth0",
        # what is marked does not leave a TPROXY pod, wherever it goes
        rng.choice((0, 0, TPROXY_MARK)) if local and not udp else 0,
        does_loopback_stay=True,
    )
    connector = rng.choice(IDS), rng.choice(IDS)
    return Case(asked, family, destination, connector, rng.random() < 0.5)


def destination_of(rng: Random, policy: CapturePolicy, version: int) -> IPAddress:
    """One of the usual places, or at the edges of or inside the policy's ranges."""
    networks = [each for each in (*policy.include_outbound, *policy.exclude_outbound) if each.version == version]
    if networks and rng.random() < 0.4:
        network = rng.choice(networks)
        last = network.num_addresses - 1
        found = network[rng.choice((0, last, rng.randint(0, last)))]
        if is_dialable(found):
            return found
    return rng.choice(PLACES[version])


def incoming(rng: Random) -> Case:
    """A connection from the other end of the cable."""
    is_ipv6 = rng.random() < 0.5
    sources: tuple[IPAddress, ...] = (PEER6, OUTSIDE6) if is_ipv6 else (PEER4, OUTSIDE4)
    asked = Inbound(rng.choice(PORTS), rng.choice(sources), OWN, "eth0")
    return Case(asked, "6" if is_ipv6 else "4", OWN6 if is_ipv6 else OWN4)


def is_local(ip: IPAddress) -> bool:
    return ip.is_loopback or ip.is_unspecified or ip in OWN or str(ip) == "::6" or str(ip).startswith("fd73:6964:")


def is_dialable(ip: IPAddress) -> bool:
    """Whether somebody answers: not on the cable but for its two ends, no broadcast, nothing special."""
    if ip in (*PLACES[4], *PLACES[6]):
        return True
    if isinstance(ip, IPv4Address):
        special = ip.is_multicast or ip.is_reserved or str(ip) in ("127.0.0.0", "127.255.255.255")
        return not special and not str(ip).startswith(("10.9.0.", "0."))
    special = ip.is_multicast or ip.is_link_local or int(ip) < 1 << 64
    return not special and not str(ip).startswith("fd99::")


# ---- judging ---------------------------------------------------------------------------------------------------------


def verdict_of(policy: CapturePolicy, case: Case) -> Verdict:
    if case.is_ipv6 and not policy.dual_stack:  # the pod's first address is IPv4
        return Verdict("pass", "no IPv6")
    return outbound(policy, case.asked) if isinstance(case.asked, Outbound) else inbound(policy, case.asked)


def answerer(case: Case, verdict: Verdict) -> str:
    """Who should answer."""
    if verdict.action == "unreachable":
        return "Invalid argument"  # IPv4 does not let loopback's addresses out
    if verdict.action != "pass":
        return {"proxy-outbound": "E1", "proxy-inbound": "E6", "dns": "D"}[verdict.action]
    if isinstance(case.asked, Outbound) and not is_local(case.destination):
        # the kernel does not let loopback's addresses out
        from_loopback = case.asked.source is not None and case.asked.source.is_loopback
        return "Invalid argument" if from_loopback else "remote"
    is_tcp = isinstance(case.asked, Inbound) or case.asked.protocol == "tcp"
    return {15001: "E1", 15006: "E6"}.get(case.asked.port, "app") if is_tcp else "app"


def differences(case: Case, verdict: Verdict, seen: dict[str, Any], has_ipv6: bool) -> list[str]:
    """How what was seen is not what should have been."""
    answers = seen.get("answers")
    heard = answers[0] if answers else seen
    target = [str(case.destination), case.asked.port]
    found = []
    if heard.get("hit") != answerer(case, verdict):
        return [f"answered by {heard.get('hit')}, not {answerer(case, verdict)}"]
    if case.destination.is_unspecified or "source" not in heard:
        return []
    if heard["hit"] in ("E1", "E6") and (has_ipv6 or not case.is_ipv6) and heard["original"] != target:
        found.append(f"original destination {heard['original']}")
    bound = case.asked.source
    if bound is None and not case.destination.is_loopback and case.destination in (*PLACES[4], *PLACES[6]):
        bound = OWN6 if case.is_ipv6 else OWN4
    if bound is not None and not is_special(case) and heard["source"] != str(bound):
        found.append(f"comes from {heard['source']}, not {bound}")
    shown = heard["from"] if answers else seen["client_peer"]
    if [shown[0].removeprefix("::ffff:"), shown[1]] != target:
        found.append(f"its client sees {shown}")
    return found


def is_special(case: Case) -> bool:
    """Local to the pod without being its address: the kernel picks the source."""
    return is_local(case.destination) and case.destination not in OWN and case.asked.source is None


def test_the_programs_decide_as_the_reference_does(wire: Wire) -> None:
    wire.enrol()
    surroundings, rules, wrong = Surroundings(wire), Counter[str](), list[str]()
    for seed in range(CONNECTIONS // EACH):
        drawn = draw(seed)
        surroundings.enrol(drawn.policy, drawn.fresh)
        for case, seen in zip(drawn.cases, surroundings.try_all(drawn.cases), strict=True):
            verdict = verdict_of(drawn.policy, case)
            rules[verdict.rule] += 1
            if found := differences(case, verdict, seen, drawn.policy.dual_stack):
                wrong.append(f"draw({seed}): {drawn.policy}\n{case}\n{verdict}: {'; '.join(found)}\n{seen}\n")
        assert not wrong, "\n".join(wrong)
    assert RULES - set(rules) == set()
