"""Whose packet it is: the namespace it arrives in says so, and no address does."""

import json
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from bpf.layout import TOTALS, AddressKey
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Wire, ip_command
from tests.lab.inside import PYTHON

FAMILIES = ["ip4", "ip6"]
FORGED = """
import json, socket, struct, sys
source, target, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
payload = b"forged"
length = 8 + len(payload)
pseudo = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
pseudo += struct.pack("!IxxxB", length, socket.IPPROTO_UDP)
datagram = struct.pack("!HHHH", 4000, port, length, 0) + payload
total = sum(struct.unpack(f"!{len(pseudo + datagram) // 2}H", pseudo + datagram))
while total >> 16:
    total = (total & 0xFFFF) + (total >> 16)
datagram = datagram[:6] + struct.pack("!H", ~total & 0xFFFF) + datagram[8:]
header = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64) + pseudo[:32]
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
    raw.sendto(header + datagram, (target, 0))
print(json.dumps("sent"))
"""
RECEIVER = """
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", int(sys.argv[1])))
s.settimeout(float(sys.argv[2]))
print("ready", flush=True)
try:
    print(s.recv(99).decode(), flush=True)
except TimeoutError:
    print("nothing", flush=True)
"""


@pytest.mark.claim("be taken for another pod")
@pytest.mark.claim("be named as that pod in status, counters and trace")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_pods_with_the_same_address_are_both_captured(make_wire: Callable[[], Wire], family: str) -> None:
    first, second = make_wire(), make_wire()
    for wire, who in ((first, "inbound-first"), (second, "inbound-second")):
        wire.enrol()
        wire.pod.serve(who, "15006", uid=PROXY)
        wire.pod.serve("app", "8080")
    assert first.peer.dial(getattr(first.pod, family), 8080)["who"] == "inbound-first"
    assert second.peer.dial(getattr(second.pod, family), 8080)["who"] == "inbound-second"
    counted = [wire.kernel.tables.tallies.get(wire.key) for wire in (first, second)]
    # a SYN that is sent again counts again
    outcomes = [{index for index, count in enumerate(each.connections) if count} for each in counted if each]
    assert outcomes == [{TOTALS.index(("inbound", "captured"))}] * 2


@pytest.mark.claim("change another pod's policy")
@pytest.mark.claim("touch another pod's entries")
def test_a_pod_that_goes_leaves_the_other_with_its_address_captured(make_wire: Callable[[], Wire]) -> None:
    first, second = make_wire(), make_wire()
    first.mesh()
    second.mesh()
    assert first.kernel.enrolments.remove(first.sandbox.cookie)
    assert second.peer.dial(second.pod.ip4, 8080)["who"] == "inbound"
    assert second.pod.dial(second.peer.ip4, 8080)["who"] == "outbound"


@pytest.mark.claim("A pod that takes a neighbour's addresses changes nothing for the neighbour")
def test_a_pod_with_a_neighbours_addresses_changes_nothing_for_the_neighbour(make_wire: Callable[[], Wire]) -> None:
    hostile, victim = make_wire(), make_wire()
    ip_command("-n", hostile.pod.path.name, "addr", "add", "10.9.7.7/32", "dev", "eth0")
    ip_command("-n", victim.pod.path.name, "addr", "add", "10.9.7.7/24", "dev", "eth0")
    ip_command("-n", victim.peer.path.name, "addr", "add", "10.9.7.1/24", "dev", "eth0")
    for wire in (hostile, victim):
        wire.look_again()
        wire.mesh()
    assert victim.peer.dial("10.9.7.7", 8080)["who"] == "inbound"
    tables, own = victim.kernel.tables, ip_address("10.9.7.7")
    assert all(tables.addresses.get(AddressKey.of(wire.sandbox.cookie, own)) for wire in (hostile, victim))


@pytest.mark.parametrize(("route", "target"), [("10.201.0.0/24", "10.201.0.9"), ("fd99:201::/64", "fd99:201::9")])
def test_what_is_local_by_a_route_alone_is_captured_and_denied(wire: Wire, route: str, target: str) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, deny_inbound_ports=frozenset({15020})))
    via = wire.pod.ip6 if ":" in target else wire.pod.ip4
    ip_command("-n", wire.pod.path.name, "route", "add", "local", route, "dev", "lo")
    ip_command("-n", wire.peer.path.name, "route", "add", route, "via", via)
    seen = wire.peer.dial(target, 8080)
    assert (seen["who"], seen["original"]) == ("inbound", [target, 8080])
    assert wire.peer.dial(target, 15020) == {"error": "Connection refused"}


@pytest.mark.parametrize("source", ["own", "peer"])
def test_a_datagram_with_a_forged_source_does_not_reach_a_denied_port(wire: Wire, source: str) -> None:
    ip_command("-n", wire.pod.path.name, "addr", "add", "fd99::9/64", "dev", "eth0", "nodad")
    wire.look_again()
    wire.enrol(CapturePolicy(dual_stack=True, deny_inbound_ports=frozenset({5000})))
    receivers = [wire.pod.start([*PYTHON, RECEIVER, str(port), "1.5"], PROXY) for port in (5000, 5001)]
    wire.peer.dial(wire.pod.ip6, 9)  # so that the neighbour is known: nobody would answer a forged source's question
    forged = "fd99::9" if source == "own" else wire.peer.ip6
    for port in (5000, 5001):
        assert wire.peer.python(FORGED, forged, wire.pod.ip6, port, uid=0) == "sent"
    heard = [receiver.communicate(timeout=5)[0].strip() for receiver in receivers]
    assert heard == ["nothing", "forged"], json.dumps(heard)


def test_a_pod_may_talk_to_itself_at_what_is_local_by_a_route_alone(wire: Wire) -> None:
    wire.mesh()
    ip_command("-n", wire.pod.path.name, "route", "add", "local", "10.201.0.0/24", "dev", "lo")
    assert wire.pod.dial("10.201.0.9", 8080, uid=PROXY)["who"] == "app"


def test_a_pod_may_talk_to_itself_on_a_port_that_it_denies(wire: Wire) -> None:
    wire.enrol(CapturePolicy(dual_stack=True, deny_inbound_ports=frozenset({8080})))
    wire.pod.serve("app", "8080")
    for target in (wire.pod.ip4, wire.pod.ip6, "127.0.0.1", "::1"):
        assert wire.pod.dial(target, 8080)["who"] == "app"
