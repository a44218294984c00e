"""Generated Pods and connections: the running programs decide each as cni/decision.py does.

Annotations are drawn, made a policy and enrolled; then connections of any user, source, family and destination are made
in the pod and to it, and who answers tells the verdict. 500 connections by default; HYPOTHESIS_EXAMPLES=10000 makes
that many. What only sidestep has (early outbound, strict proxies) has tests of its own.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import annotations
from cni.annotations import CapturePolicy, policy_of
from cni.decision import Inbound, IPAddress, Outbound, Verdict, inbound, outbound
from cni.pod import Pod
from tests.datapath.conftest import Wire
from tests.datapath.probing import OUTSIDE4, OUTSIDE6, PORTS, UDP_PORTS, Case, Surroundings

EACH = 25  # connections a Pod
CONNECTIONS = int(os.environ.get("HYPOTHESIS_EXAMPLES", "500"))

PEER4, PEER6 = IPv4Address("10.9.0.1"), IPv6Address("fd99::1")
OWN4, OWN6 = IPv4Address("10.9.0.2"), IPv6Address("fd99::2")
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

# a generator that never gets to a rule shows nothing about it: with this many connections all must come up
ENOUGH = 5_000
ACTIONS = {"pass", "proxy-outbound", "proxy-inbound", "dns"}
RULES = {"O0", "O1", "O2", "O3a", "O3b", "O3c", "O4a", "O4c", "O6", "O7", "O8", "O9", "O10", "O11", "T"}
RULES |= {"I1", "I2", "I3", "I4", "I5", "no IPv6"}


class Drawn(NamedTuple):
    """A Pod, and connections to try with it."""

    pod: Pod
    policy: CapturePolicy
    cases: list[Case]
    fresh: bool  # or enrolled over the one before


# ---- drawing ---------------------------------------------------------------------------------------------------------

port_texts = st.just("") | st.lists(st.sampled_from(PORTS), max_size=4).map(lambda ports: ",".join(map(str, ports)))
range_texts = st.lists(st.sampled_from(NETWORKS), max_size=5).map(",".join)
TEXTS = {
    annotations.INTERCEPTION_MODE: st.sampled_from(["REDIRECT", "TPROXY"]),
    annotations.INCLUDE_OUTBOUND_RANGES: range_texts | st.just("*"),
    annotations.EXCLUDE_OUTBOUND_RANGES: range_texts,
    annotations.INCLUDE_OUTBOUND_PORTS: port_texts,
    annotations.EXCLUDE_OUTBOUND_PORTS: port_texts,
    annotations.INCLUDE_INBOUND_PORTS: port_texts | st.just("*"),
    annotations.EXCLUDE_INBOUND_PORTS: port_texts,
    annotations.EXCLUDE_INTERFACES: st.sampled_from(["", "", "", "eth0", "lo", "lo,eth0", "net9"]),
}
ids = st.sampled_from([None, *IDS])
switches = st.sampled_from(["true", "false"])


@st.composite
def drawings(draw: st.DrawFn) -> Drawn:
    env = [
        {"name": annotations.DNS_CAPTURE, "value": draw(switches)},
        {"name": annotations.DUAL_STACK, "value": draw(st.sampled_from(["true", "true", "true", "false"]))},
    ]
    proxy = {"name": "istio-proxy", "env": env, "securityContext": {"runAsUser": draw(ids), "runAsGroup": draw(ids)}}
    texts = draw(st.fixed_dictionaries({}, optional=TEXTS))
    pod = Pod.model_validate({"metadata": {"name": "pod", "annotations": texts}, "spec": {"containers": [proxy]}})
    policy = policy_of(pod)
    case = outbound_cases(policy) | outbound_cases(policy) | outbound_cases(policy) | inbound_cases()
    return Drawn(pod, policy, draw(st.lists(case, min_size=EACH, max_size=EACH)), draw(st.booleans()))


@st.composite
def outbound_cases(draw: st.DrawFn, policy: CapturePolicy) -> Case:
    families: list[Literal["4", "6", "mapped"]] = ["4", "6", "mapped"]
    family = draw(st.sampled_from(families))
    version = 6 if family == "6" else 4
    destination = draw(destinations(policy, version))
    local = is_local(destination)
    own, sources = (OWN4, ("127.0.0.1", "127.0.0.6")) if version == 4 else (OWN6, ("::1", "::6"))
    # a datagram's answer has to find the way back, and ::1 does not leave the pod
    udp = draw(st.sampled_from([False] * 7 + [True]))
    around = [ip_address(each) for each in sources] if not udp and (local or version == 4) else []
    return Case(
        Outbound(
            destination,
            draw(st.sampled_from(UDP_PORTS if udp else PORTS)),
            draw(st.sampled_from([None, None, None, own, *around])),
            draw(st.sampled_from([*IDS, policy.proxy_uid])),
            draw(st.sampled_from([*IDS, policy.proxy_gid])),
            OWN,
            "udp" if udp else "tcp",
            None if local else "eth0",
            # marked packets of a TPROXY pod do not leave it, wherever they go
            draw(st.sampled_from([0, 0, 1337])) if local and not udp else 0,
        ),
        family,
        destination,
        (draw(st.sampled_from(IDS)), draw(st.sampled_from(IDS))),
        draw(st.booleans()),
    )


def destinations(policy: CapturePolicy, version: int) -> st.SearchStrategy[IPAddress]:
    """The usual places, and the edges and insides of the policy's ranges."""
    usual = st.sampled_from(PLACES[version])
    networks = [each for each in (*policy.include_outbound, *policy.exclude_outbound) if each.version == version]
    if not networks:
        return usual
    inside = st.sampled_from(networks).flatmap(
        lambda network: st.sampled_from([0, 1, network.num_addresses // 2, network.num_addresses - 1]).map(
            lambda offset: network[offset % network.num_addresses]
        )
    )
    return usual | inside.filter(is_dialable)


@st.composite
def inbound_cases(draw: st.DrawFn) -> Case:
    is_ipv6 = draw(st.booleans())
    sources: list[IPAddress] = [PEER6, OUTSIDE6] if is_ipv6 else [PEER4, OUTSIDE4]
    source = draw(st.sampled_from(sources))
    asked = Inbound(draw(st.sampled_from(PORTS)), source, OWN, "eth0")
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


@pytest.mark.xdist_group("generated")
def test_the_programs_decide_as_the_reference_does(wire: Wire) -> None:
    wire.enrol()
    surroundings, rules, actions = Surroundings(wire), Counter[str](), Counter[str]()

    @settings(max_examples=CONNECTIONS // EACH)
    @given(drawings())
    def decides_alike(drawn: Drawn) -> None:
        surroundings.enrol(drawn.policy, drawn.fresh)
        verdicts = [verdict_of(drawn.policy, case) for case in drawn.cases]
        wrong = []
        for case, verdict, seen in zip(drawn.cases, verdicts, surroundings.try_all(drawn.cases), strict=True):
            rules[verdict.rule] += 1
            actions[verdict.action] += 1
            found = differences(case, verdict, seen, drawn.policy.dual_stack)
            wrong += [f"{case}\n  {verdict}: {'; '.join(found)}\n  {seen}"] if found else []
        assert not wrong, "\n".join([str(drawn.pod), *wrong])

    run: Callable[[], None] = decides_alike
    run()
    assert set(actions) == ACTIONS
    assert set(rules) >= RULES or CONNECTIONS < ENOUGH
