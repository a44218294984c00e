"""What an enrolment writes, and that it is all of it or nothing."""

from dataclasses import replace
from ipaddress import ip_network

import pytest

from bpf.layout import Cookie, PortKey, PortRule, Word
from cni.enrolment.enroll import Enrolments
from cni.errors import RegistrationFailed
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import Wire


def test_enrolling_twice_is_the_same_as_once(wire: Wire) -> None:
    empty = wire.kernel.entries()
    wire.enrol()
    once = wire.kernel.entries()
    assert once == empty | {
        "pods": 1,
        "addresses": 2,
        "routes": 1,
        "port_rules": 3,
        "traffic": 1,
        "tallies": 1,
        "links": 1,
        "lost_handovers": 1,
        "coverage": 1,
        "forgotten": 1,
        "flow_sums": 1,
        "flows_forgotten": 1,
    }
    wire.enrol()
    assert wire.kernel.entries() == once


def test_enrolling_with_another_policy_leaves_nothing_of_the_first(wire: Wire) -> None:
    wire.enrol(CapturePolicy(exclude_outbound=(ip_network("10.0.0.0/8"),), exclude_outbound_ports=frozenset({1, 2})))
    entries = wire.enrol(CapturePolicy(exclude_outbound_ports=frozenset({2, 3})))
    assert wire.kernel.entries()["networks"] == 0
    assert wire.kernel.entries()["port_rules"] == 5
    assert wire.kernel.enrolments.differences(wire.sandbox.cookie, entries) == []


def test_removing_leaves_nothing(wire: Wire) -> None:
    empty = wire.kernel.entries()
    wire.enrol(CapturePolicy(dual_stack=True, exclude_outbound=(ip_network("10.0.0.0/8"), ip_network("fd00::/8"))))
    assert wire.kernel.enrolments.remove(wire.sandbox.cookie)
    assert wire.kernel.entries() == empty
    assert not wire.kernel.enrolments.remove(wire.sandbox.cookie)


@pytest.mark.claim("the ADD fails and names the map")
def test_a_full_table_fails_the_enrolment_by_name_and_leaves_nothing(wire: Wire) -> None:
    rules, limit, filler = wire.kernel.tables.port_rules, 262144, 1
    empty = wire.kernel.entries()
    full = [PortKey(filler + number // 65536, number % 65536) for number in range(limit)]
    try:
        for key in full:
            rules.put(key, Word(PortRule.EXCLUDE_OUTBOUND))
        with pytest.raises(RegistrationFailed, match=f"BPF map port_rules is full at {limit} entries"):
            wire.enrol()
    finally:
        for key in full:
            rules.remove(key)
    assert wire.kernel.entries() == empty


def test_a_name_that_does_not_fit_fails_the_enrolment(wire: Wire) -> None:
    entries = wire.enrol()
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    long = replace(entries, identity=replace(entries.identity, network="n" * 128))
    with (
        wire.pod.path.open() as netns,
        pytest.raises(RegistrationFailed, match=r"network .* has 128 bytes; at most 127"),
    ):
        wire.kernel.enrolments.add(wire.sandbox.cookie, long, netns.fileno())
    assert wire.kernel.entries()["links"] == 0


def test_a_restarted_agent_reads_everything_back(wire: Wire) -> None:
    empty = wire.kernel.entries()
    wire.enrol(CapturePolicy(exclude_outbound=(ip_network("10.0.0.0/8"),)))
    again = Enrolments(wire.kernel.pins, wire.kernel.tables)
    assert again.of_attachment(f"container-{wire.sandbox.cookie}", "eth0") == [wire.sandbox.cookie]
    assert again.remove(wire.sandbox.cookie)
    assert wire.kernel.entries() == empty


def test_nobody_unlinks_what_the_maps_call_enrolled(wire: Wire) -> None:
    before = Enrolments(wire.kernel.pins, wire.kernel.tables)
    wire.mesh()
    assert before.reclaim() == []
    assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "inbound"


@pytest.mark.parametrize("linked", [True, False])
def test_what_a_crash_left_half_written_is_reclaimed(wire: Wire, linked: bool) -> None:
    empty = wire.kernel.entries()
    wire.enrol()
    wire.kernel.tables.pods.remove(Cookie(wire.sandbox.cookie))
    if not linked:
        wire.kernel.pins.netns.joinpath(str(wire.sandbox.cookie)).unlink()
    Enrolments(wire.kernel.pins, wire.kernel.tables).reclaim()
    assert wire.kernel.entries() == empty


@pytest.mark.parametrize("lost", ["pod", "port", "address", "link"])
def test_check_says_what_differs(wire: Wire, lost: str) -> None:
    entries, kernel, cookie = wire.enrol(), wire.kernel, wire.sandbox.cookie
    if lost == "pod":
        kernel.tables.pods.remove(Cookie(cookie))
    elif lost == "port":
        kernel.tables.port_rules.remove(PortKey(cookie, 15020))
    elif lost == "address":
        for key in list(kernel.tables.addresses.every_key()):
            kernel.tables.addresses.remove(key)
    else:
        kernel.pins.netns.joinpath(str(cookie)).unlink()
    assert lost in " ".join(kernel.enrolments.differences(cookie, entries))
