"""A policy that changes while the pod runs: each new connection meets the old one whole, or the new one whole."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_network

import pytest

from bpf.errors import TableFull
from bpf.layout import PodFlags, PortKey, PortRule, Word
from cni.enrolment.enroll import Enrolments
from cni.enrolment.terms import Terms, terms_of
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import APP, Namespace, Wire
from tests.lab.inside import PYTHON

SECONDS = 5.0
# Rows that decide about nobody, so that a policy takes milliseconds to write.
FILLER_PORTS = frozenset(range(20000, 20200))
FILLER_RANGES = tuple(ip_network(f"11.{n >> 8}.{n & 255}.0/24") for n in range(200))
# Connects in turn to each HOST PORT pair until a line comes in, then prints how often who has answered.
CONNECTING = """
import collections, json, select, socket, sys
ends = [(sys.argv[i], int(sys.argv[i + 1])) for i in range(1, len(sys.argv), 2)]
found = collections.defaultdict(collections.Counter)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for host, port in ends:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.settimeout(5)
            try:
                s.connect((host, port))
                answer = s.makefile().readline()
            except OSError as error:
                answer = json.dumps({"who": error.strerror})
        found[f"{host} {port}"][json.loads(answer)["who"]] += 1
print(json.dumps(found), flush=True)
"""


def policies(wire: Wire) -> tuple[CapturePolicy, CapturePolicy]:
    """Two policies with the same verdicts by other means: of flags, ports and ranges, each has what the other has not.

    Captured by both: to 8080 of the peer's IPv4, from it to 9090. Direct by both: to 9090 of its IPv6, from it to 8080.
    Flags of one with rows of the other give another verdict to each of these.
    """
    by_ports = CapturePolicy(
        dual_stack=True,
        exclude_outbound_ports=frozenset((9090,)) | FILLER_PORTS,
        exclude_inbound_ports=frozenset((8080, 15020, 15021, 15090)),
    )
    by_ranges = CapturePolicy(
        dual_stack=True,
        outbound_all=False,
        include_outbound=(ip_network(f"{wire.peer.ip4}/32"), *FILLER_RANGES),
        exclude_outbound_ports=frozenset(),
        inbound_all=False,
        include_inbound_ports=frozenset((9090,)) | FILLER_PORTS,
    )
    return by_ports, by_ranges


def wanted(wire: Wire) -> dict[str, str]:
    """Who answers by either policy, by end as CONNECTING names it: two that the pod dials, two that the peer dials."""
    return {
        f"{wire.peer.ip4} 8080": "outbound",
        f"{wire.peer.ip6} 9090": "remote",
        f"{wire.pod.ip4} 9090": "inbound",
        f"{wire.pod.ip6} 8080": "app",
    }


def put(wire: Wire, terms: Terms) -> None:
    enrolments = wire.kernel.enrolments
    enrolments.change(wire.sandbox.cookie, lambda _: terms)
    enrolments.settle()


def answers(wire: Wire) -> dict[str, str]:
    """Who answers now."""
    return {
        end: (wire.pod if number < 2 else wire.peer).dial(end.split()[0], int(end.split()[1])).get("who", "nobody")
        for number, end in enumerate(wanted(wire))
    }


@contextmanager
def connecting(end: Namespace, *ends: str) -> Iterator[list[dict[str, dict[str, int]]]]:
    """Connect without a pause meanwhile; afterwards the list has what was counted."""
    process = end.start([*PYTHON, CONNECTING, *" ".join(ends).split()], APP)
    counted: list[dict[str, dict[str, int]]] = []
    yield counted
    counted.append(json.loads(told(process)))


def told(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.mark.parametrize("number", [0, 1])
def test_either_policy_gives_the_same_verdicts(wire: Wire, number: int) -> None:
    wire.mesh(policies(wire)[number])
    assert answers(wire) == wanted(wire)


@pytest.mark.parametrize("flags_of", [0, 1])
def test_half_of_either_would_show(wire: Wire, flags_of: int) -> None:
    """Else the test after this one would prove nothing."""
    both = [terms_of(each) for each in policies(wire)]
    wire.mesh()
    rows = PodFlags.PORT_RULES | PodFlags.NETWORKS
    flags = both[flags_of].flags & ~rows | both[1 - flags_of].flags & rows
    put(wire, replace(both[1 - flags_of], flags=flags))
    wrong = {end for end, who in answers(wire).items() if who != wanted(wire)[end]}
    assert len(wrong) == 2, wrong


def test_no_rows_at_all_would_show(wire: Wire) -> None:
    """As when the rows of a policy went while a program is at work with it."""
    wire.mesh()
    shown = set()
    for each in policies(wire):
        put(wire, Terms(terms_of(each).flags, {}, {}))
        shown |= {end for end, who in answers(wire).items() if who != wanted(wire)[end]}
    assert shown == set(wanted(wire))


@pytest.mark.claim("never parts of two")
def test_no_connection_meets_parts_of_two_policies(wire: Wire) -> None:
    both = [terms_of(each) for each in policies(wire)]
    wire.mesh(policies(wire)[0])
    ends = list(wanted(wire))
    flips, until = 0, time.monotonic() + SECONDS
    with connecting(wire.pod, *ends[:2]) as out, connecting(wire.peer, *ends[2:]) as into:
        while time.monotonic() < until:
            flips += 1
            put(wire, both[flips % 2])
    found = out[0] | into[0]
    assert {end: list(counts) for end, counts in found.items()} == {end: [who] for end, who in wanted(wire).items()}
    assert flips > 20 and all(sum(counts.values()) > 100 for counts in found.values()), (flips, found)


def test_the_rows_of_the_old_policy_go(wire: Wire) -> None:
    one, other = (terms_of(each) for each in policies(wire))
    wire.mesh(policies(wire)[0])
    before = wire.kernel.policies()
    put(wire, other)
    assert wire.kernel.entries()["networks"] == before["networks"] + len(FILLER_RANGES) + 1
    put(wire, one)
    assert wire.kernel.policies() == before
    assert wire.kernel.enrolments.damaged() == {}
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    assert all(key.cookie != wire.sandbox.cookie for key in wire.kernel.tables.port_rules.every_key())


def test_an_agent_that_ended_in_the_middle_of_a_change_leaves_nothing(wire: Wire) -> None:
    one, other = policies(wire)
    wire.mesh(one)
    enrolments, tables, cookie = wire.kernel.enrolments, wire.kernel.tables, wire.sandbox.cookie
    before = wire.kernel.policies()
    entry = enrolments.entry(cookie)
    assert entry is not None
    tables.port_rules.put(PortKey(cookie, 9999, entry.policy + 1), Word(PortRule.INCLUDE_OUTBOUND))  # before the switch
    Enrolments(wire.kernel.pins, tables).close()
    assert wire.kernel.policies() == before
    enrolments.change(cookie, lambda _: terms_of(other))  # after it, before the old rows went
    Enrolments(wire.kernel.pins, tables).close()
    assert wire.kernel.entries()["port_rules"] == len(terms_of(other).port_rules)
    assert answers(wire) == wanted(wire)
    put(wire, terms_of(one))
    assert wire.kernel.policies() == before


@pytest.mark.claim("has no room for it: Event `LivePolicyRefused`")
def test_a_policy_for_which_there_is_no_room_changes_nothing(wire: Wire) -> None:
    one, other = (terms_of(each) for each in policies(wire))
    wire.mesh(policies(wire)[0])
    before, rules = wire.kernel.policies(), wire.kernel.tables.port_rules
    filler = [PortKey(1 + number // 65536, number % 65536) for number in range(rules.limit - before["port_rules"] - 9)]
    try:
        for key in filler:
            rules.put(key, Word(PortRule.EXCLUDE_OUTBOUND))
        with pytest.raises(TableFull, match="BPF map port_rules is full"):
            put(wire, other)
        assert answers(wire) == wanted(wire)
    finally:
        for key in filler:
            rules.remove(key)
    assert wire.kernel.policies() == before
    put(wire, other)
    put(wire, one)
    assert wire.kernel.policies() == before


def test_what_is_denied_past_the_proxy_changes_too(wire: Wire) -> None:
    wire.mesh(CapturePolicy())
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "remote"
    put(wire, terms_of(CapturePolicy(uncaptured="deny")))
    assert wire.pod.dial(wire.peer.ip6, 8080) == {"error": "Operation not permitted"}
    put(wire, terms_of(CapturePolicy()))
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "remote"
