"""What leaves or reaches a pod past its proxy is listed, whatever it is; and refused if the pod wants it so."""

import errno
import json
import os
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest

from bpf.layout import UNCAPTURED_PER_POD, CoverageEntry, UncapturedEntry, UncapturedKey, Way
from cni.enrolment.records import uncaptured_record
from cni.enrolment.uncaptured import Sums, Uncaptured, listed, sums_of
from cni.policy.annotations import CapturePolicy
from tests.datapath.test_denied_ports import BOUND, UDP
from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON

REFUSED = os.strerror(errno.EPERM)
PACKETS = Path(__file__).parents[1] / "lab" / "packets.py"
EXCLUDING = CapturePolicy(
    dual_stack=True,
    exclude_outbound_ports=frozenset((8080,)),
    exclude_inbound_ports=frozenset((8080, 15020, 15021, 15090)),
)
# a socket of a family, type and protocol; sends one packet to a host if there is one
RAW = """
import json, socket, sys
family, kind, protocol, host = *map(int, sys.argv[1:4]), sys.argv[4]
try:
    s = socket.socket(family, kind, protocol)
    if host:
        s.sendto(bytes((128 if family == socket.AF_INET6 else 8, 0, 0xf7, 0xff, 0, 0, 0, 0)), (host, 0))
    print(json.dumps("sent"))
except OSError as error:
    print(json.dumps(error.strerror))
"""
ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", int(sys.argv[1])))
print("ready", flush=True)
while True:
    s.sendto(*s.recvfrom(9))
"""
ASK = """
import json, socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
s.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
print(json.dumps(s.recv(9).decode()))
"""
MANY = """
import json, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
first, last = int(sys.argv[1]), int(sys.argv[2])
for n in range(first, last):
    s.sendto(b"x", (f"198.18.{n >> 8}.{n & 255}", 4000))
print(json.dumps(last - first))
"""


def sums(wire: Wire) -> Sums:
    found = sums_of(wire.kernel.tables, wire.sandbox.cookie)
    assert found is not None
    return found


def everything(wire: Wire) -> list[Uncaptured]:
    return listed(wire.kernel.tables).get(wire.sandbox.cookie, [])


def only(wire: Wire) -> Uncaptured:
    found = everything(wire)
    assert len(found) == 1, found
    return found[0]


def seen(each: Uncaptured) -> tuple[Any, ...]:
    return each.way, each.address, each.port, each.protocol, each.rule, each.is_refused


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_a_direct_connection_is_listed_with_its_rule_and_process(wire: Wire, family: str) -> None:
    wire.mesh(EXCLUDING)
    peer = getattr(wire.peer, family)
    for _ in range(3):
        assert wire.pod.dial(peer, 8080)["who"] == "remote"
    found = only(wire)
    assert seen(found) == (Way.OUT, peer, 8080, "tcp", "O1", False)
    assert (found.count, found.uid, found.command) == (3, APP, "python3.11")
    assert found.pid > 0 and found.first < found.last
    assert sums(wire).passages["outbound", "tcp"] == sums(wire).past == 3


def test_captured_connections_are_not_listed(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True))
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "inbound"
    assert everything(wire) == []
    assert (sums(wire).past, sums(wire).refused) == (0, 0)


def test_what_the_proxy_sends_and_what_stays_in_the_pod_is_not_past_the_proxy(wire: Wire) -> None:
    wire.mesh(EXCLUDING)
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY)["who"] == "remote"
    assert wire.pod.python(UDP, wire.peer.ip4, 5353, "unconnected", uid=PROXY) == "sent"
    for host in (wire.pod.ip4, "127.0.0.1", wire.pod.ip6):
        assert wire.pod.dial(host, 8080)["who"] == "app"
        assert wire.pod.python(UDP, host, 5353, "unconnected") == "sent"
    assert everything(wire) == []


@pytest.mark.parametrize("how", ["connected", "unconnected"])
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_datagrams_are_listed(wire: Wire, family: str, how: str) -> None:
    wire.mesh(CapturePolicy(dual_stack=True))
    peer = getattr(wire.peer, family)
    assert wire.pod.python(UDP, peer, 443, how) == "sent"
    assert seen(only(wire)) == (Way.OUT, peer, 443, "udp", "UDP", False)


def test_datagrams_to_an_excluded_port_or_range_name_that_rule(wire: Wire) -> None:
    wire.mesh(EXCLUDING.model_copy(update={"exclude_outbound": (ip_network(f"{wire.peer.ip6}/128"),)}))
    assert wire.pod.python(UDP, wire.peer.ip4, 8080, "unconnected") == "sent"
    assert wire.pod.python(UDP, wire.peer.ip6, 514, "connected") == "sent"
    assert {each.rule for each in everything(wire)} == {"O1", "O8"}


def test_ipv6_that_is_not_captured_is_listed(wire: Wire) -> None:
    wire.mesh(CapturePolicy())
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "remote"
    assert seen(only(wire)) == (Way.OUT, wire.peer.ip6, 8080, "tcp", "no IPv6", False)


def test_inbound_past_the_proxy_is_listed(wire: Wire) -> None:
    wire.mesh(EXCLUDING)
    assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "app"
    wire.pod.start([*PYTHON, BOUND, "0.0.0.0", "9999", "5"], APP)
    assert wire.peer.python(UDP, wire.pod.ip4, 9999, "unconnected") == "sent"
    assert {seen(each) for each in everything(wire)} == {
        (Way.IN, wire.peer.ip4, 8080, "tcp", "I4", False),
        (Way.IN, wire.peer.ip4, 9999, "udp", "UDP", False),
    }


def test_an_answer_to_a_datagram_is_no_news(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True))
    echo = (
        "import socket; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('',7)); print('ready',flush=True)\n"
    )
    wire.peer.start([*PYTHON, f"{echo}while True:\n    b, a = s.recvfrom(9)\n    s.sendto(b, a)"], 0)
    ask = f"""
import json, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
s.sendto(b"x", ("{wire.peer.ip4}", 7))
print(json.dumps(s.recv(9).decode()))
"""
    assert wire.pod.python(ask) == "x"
    assert seen(only(wire)) == (Way.OUT, wire.peer.ip4, 7, "udp", "UDP", False)


@pytest.mark.parametrize("mode", ["allow", "deny"])
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_the_answers_of_a_server_are_no_news_and_never_denied(wire: Wire, family: str, mode: Any) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, uncaptured=mode))
    wire.pod.start([*PYTHON, ECHO, "7"], 0)
    pod, peer = getattr(wire.pod, family), getattr(wire.peer, family)
    for _ in range(2):
        assert wire.peer.python(ASK, pod, 7) == "x"
    found = only(wire)
    assert seen(found) == (Way.IN, peer, 7, "udp", "UDP", False)
    assert (found.count, sums(wire).refused) == (2, 0)


def test_a_server_may_have_more_clients_than_the_list_has_room(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, uncaptured="deny"))
    wire.pod.start([*PYTHON, ECHO, "7"], 0)
    for number in range(UNCAPTURED_PER_POD):
        wire.kernel.tables.uncaptured.put(UncapturedKey(wire.sandbox.cookie, port=number), UncapturedEntry(count=1))
    wire.kernel.tables.coverage.put(wire.key, CoverageEntry(added=UNCAPTURED_PER_POD))
    assert wire.peer.python(ASK, wire.pod.ip4, 7) == "x"
    assert sums(wire).dropped == 1


def test_inbound_that_finds_no_proxy_is_listed_as_refused(wire: Wire) -> None:
    wire.enrol(CapturePolicy(dual_stack=True))
    wire.peer.dial(wire.pod.ip4, 8080)
    assert seen(only(wire)) == (Way.IN, wire.peer.ip4, 8080, "tcp", "I4", True)
    assert sums(wire).passages["inbound", "refused"] == 1


@pytest.mark.parametrize(("family", "kind"), [(2, 3), (10, 3), (2, 2), (10, 2)])
def test_a_socket_whose_packets_no_hook_sees_is_listed(wire: Wire, family: int, kind: int) -> None:
    protocol = {2: 1, 10: 58}[family]
    wire.mesh(CapturePolicy(dual_stack=True))
    wire.pod.python(
        "import json; open('/proc/sys/net/ipv4/ping_group_range','w').write('0 9'); print(json.dumps(1))", uid=0
    )
    assert wire.pod.python(RAW, family, kind, protocol, "", uid=0) == "sent"
    found = only(wire)
    assert seen(found) == (Way.SOCKET, None, 0, {2: "icmp", 10: "icmpv6"}[family], "protocol", False)
    assert found.uid == 0


def test_every_flow_that_leaves_is_captured_or_listed(wire: Wire) -> None:
    """Held against a capture of packets: TCP, UDP, ICMP, IPv4 and IPv6, connected or not, excluded or not."""
    wire.mesh(EXCLUDING.model_copy(update={"dual_stack": False, "exclude_outbound": (ip_network("198.18.7.0/24"),)}))
    wire.pod.python(
        "import json; open('/proc/sys/net/ipv4/ping_group_range','w').write('0 9'); print(json.dumps(1))", uid=0
    )
    tap = wire.pod.start([*PYTHON, PACKETS.read_text(), "eth0"], 0)
    for peer in (wire.peer.ip4, wire.peer.ip6):
        for port in (8080, 9090, 53):
            wire.pod.dial(peer, port)
            for how in ("connected", "unconnected"):
                wire.pod.python(UDP, peer, port + 1, how)
        family, icmp = (2, 1) if peer.version == 4 else (10, 58)
        for kind in (2, 3):
            assert wire.pod.python(RAW, family, kind, icmp, peer, uid=0) == "sent"
    wire.pod.python(MANY, 0x700, 0x720)
    wire.peer.dial(wire.pod.ip4, 8080)
    assert tap.stdin is not None and tap.stdout is not None
    tap.stdin.write("\n")
    tap.stdin.flush()
    flows = json.loads(tap.stdout.readline())
    entries = everything(wire)
    ends = {(each.protocol, str(each.address), each.port) for each in entries if each.way is Way.OUT}
    sockets = {each.protocol for each in entries if each.way is Way.SOCKET}
    names = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
    own = {8080, 15001, 15006}  # of the pod's servers: what goes out from there is an answer
    left = [
        (names[protocol], host, port)
        for protocol, source, host, port in flows
        if source not in own
        and not host.startswith("ff02::")  # neighbour discovery and multicast listeners, the kernel's own
    ]
    assert {each[0] for each in left} == {"tcp", "udp", "icmp", "icmpv6"}
    missing = [each for each in left if each not in ends and each[0] not in sockets]
    assert missing == []


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_a_pod_that_denies_it_has_nothing_past_its_proxy(wire: Wire, family: str) -> None:
    wire.mesh(CapturePolicy(uncaptured="deny"))  # captures IPv4 alone
    peer = getattr(wire.peer, family)
    for how in ("connected", "unconnected"):
        assert wire.pod.python(UDP, peer, 443, how) == REFUSED
    assert wire.pod.dial(wire.peer.ip6, 8080) == {"error": REFUSED}
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert {(each.protocol, each.rule) for each in everything(wire)} == {("udp", "UDP"), ("tcp", "no IPv6")}
    assert all(each.is_refused for each in everything(wire))
    assert (sums(wire).past, sums(wire).refused) == (0, 3)


def test_a_pod_that_denies_it_opens_no_socket_that_no_hook_sees(wire: Wire) -> None:
    wire.mesh(CapturePolicy(uncaptured="deny"))
    assert wire.pod.python(RAW, 2, 3, 1, "", uid=0) == REFUSED
    assert seen(only(wire)) == (Way.SOCKET, None, 0, "icmp", "protocol", True)


def test_what_an_annotation_asks_for_is_not_denied(wire: Wire) -> None:
    wire.mesh(EXCLUDING.model_copy(update={"uncaptured": "deny"}))
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    assert wire.pod.python(UDP, wire.peer.ip4, 8080, "unconnected") == "sent"
    assert wire.pod.dial(wire.peer.ip4, 9090)["who"] == "outbound"
    assert not any(each.is_refused for each in everything(wire))


def test_ranges_that_an_annotation_leaves_out_are_not_denied_to_tcp(wire: Wire) -> None:
    policy = CapturePolicy(outbound_all=False, include_outbound=(ip_network("10.250.0.0/16"),), uncaptured="deny")
    wire.mesh(policy)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    assert wire.pod.python(UDP, wire.peer.ip4, 443, "unconnected") == REFUSED


def test_the_proxy_and_the_pod_itself_are_never_denied(wire: Wire) -> None:
    wire.mesh(CapturePolicy(uncaptured="deny"))
    assert wire.pod.dial(wire.peer.ip6, 8080, uid=PROXY)["who"] == "remote"
    assert wire.pod.python(UDP, wire.peer.ip4, 53, "unconnected", uid=PROXY) == "sent"
    assert wire.pod.python(UDP, "127.0.0.1", 53, "unconnected") == "sent"
    assert wire.pod.dial("127.0.0.1", 8080)["who"] == "app"


@pytest.mark.claim("at most 512 of each kind for a pod, until the pod goes")
def test_one_pod_has_so_many_entries_and_the_rest_is_counted(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True))
    assert wire.pod.python(MANY, 0, UNCAPTURED_PER_POD + 100) == UNCAPTURED_PER_POD + 100
    assert len(everything(wire)) == UNCAPTURED_PER_POD
    assert (sums(wire).dropped, sums(wire).past) == (100, UNCAPTURED_PER_POD + 100)


def test_the_oldest_entries_make_room(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True))
    wire.pod.python(MANY, 0, 500)
    assert uncaptured_record(wire.kernel.tables).forget_oldest() == 500 - UNCAPTURED_PER_POD // 2
    left = {each.address for each in everything(wire)}
    assert IPv4Address("198.18.1.243") in left and IPv4Address("198.18.0.0") not in left
    wire.pod.python(MANY, 1000, 1000 + UNCAPTURED_PER_POD // 2)
    assert len(everything(wire)) == UNCAPTURED_PER_POD
    assert (sums(wire).dropped, sums(wire).forgotten) == (0, 500 - UNCAPTURED_PER_POD // 2)
    assert uncaptured_record(wire.kernel.tables).forget_oldest() > 0
    assert IPv6Address("::1") not in {each.address for each in everything(wire)}


def test_a_pod_that_goes_leaves_nothing(wire: Wire) -> None:
    empty = wire.kernel.entries()
    wire.mesh(EXCLUDING)
    wire.pod.python(MANY, 0, 50)
    wire.pod.dial(wire.peer.ip4, 8080)
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    after = wire.kernel.entries()
    assert {name: after[name] for name in ("uncaptured", "coverage", "forgotten")} == {
        name: empty[name] for name in ("uncaptured", "coverage", "forgotten")
    }
