"""Ports that a pod denies: refused at once, in both directions, for everybody in it, whatever its rules say."""

import errno
import os

import pytest

from bpf.errors import TableFull
from bpf.layout import PodFlags, PortKey, PortRule, Word
from cni.enrolment.terms import denial
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON

DENIED, REFUSED = os.strerror(errno.EPERM), os.strerror(errno.ECONNREFUSED)
UDP = """
import json, socket, sys
host, port, connected = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "connected"
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
try:
    if connected:
        s.connect((host, port))
        s.send(b"x")
    else:
        s.sendto(b"x", (host, port))
    print(json.dumps("sent"))
except OSError as error:
    print(json.dumps(error.strerror))
"""
BOUND = """
import json, socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", int(sys.argv[2])))
s.settimeout(float(sys.argv[3]))
print("ready", flush=True)
try:
    print(s.recv(9).decode(), flush=True)
except TimeoutError:
    print("nothing", flush=True)
"""


def denying(outbound: tuple[int, ...] = (), inbound: tuple[int, ...] = (), **more: object) -> CapturePolicy:
    return CapturePolicy(
        dual_stack=True,
        deny_outbound_ports=frozenset(outbound),
        deny_inbound_ports=frozenset(inbound),
        **more,  # type: ignore[arg-type]
    )


def deny(wire: Wire, outbound: tuple[int, ...] = (), inbound: tuple[int, ...] = ()) -> bool:
    """Change what the running pod denies; False if that is nothing new."""
    enrolments = wire.kernel.enrolments
    change = enrolments.change(wire.sandbox.cookie, lambda terms: terms.denying(denial(outbound, inbound)))
    enrolments.settle()
    return change is not None


@pytest.mark.claim("connect() and sendmsg() fail with EPERM")
@pytest.mark.parametrize("uid", [APP, PROXY])
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_connect_to_a_denied_port_fails_at_once(wire: Wire, family: str, uid: int) -> None:
    wire.mesh(denying(outbound=(8080,)))
    peer = getattr(wire.peer, family)
    assert wire.pod.dial(peer, 8080, uid=uid) == {"error": DENIED}
    assert wire.pod.dial(peer, 9090, uid=uid)["who"] == ("remote" if uid == PROXY else "outbound")


def test_a_mapped_address_is_denied_too(wire: Wire) -> None:
    wire.mesh(denying(outbound=(8080,)))
    assert wire.pod.dial(f"::ffff:{wire.peer.ip4}", 8080) == {"error": DENIED}


@pytest.mark.claim("are refused to the proxy and to everybody in the pod, excluded or not")
def test_a_denied_port_is_denied_although_capture_excludes_it(wire: Wire) -> None:
    wire.mesh(denying(outbound=(8080,), exclude_outbound_ports=frozenset((8080,))))
    assert wire.pod.dial(wire.peer.ip4, 8080) == {"error": DENIED}


@pytest.mark.claim("loopback is never denied")
def test_the_pod_itself_is_not_the_network(wire: Wire) -> None:
    wire.mesh(denying(outbound=(8080,), inbound=(8080,)))
    for host in (wire.pod.ip4, wire.pod.ip6, "127.0.0.1"):
        assert wire.pod.dial(host, 8080)["who"] == "app"
    assert wire.pod.dial(wire.pod.ip4, 8080, "127.0.0.6", uid=PROXY)["who"] == "app"


def test_ipv6_of_a_pod_that_captures_ipv4_alone_is_denied_too(wire: Wire) -> None:
    wire.mesh(denying(outbound=(8080,), inbound=(8080,)).model_copy(update={"dual_stack": False}))
    assert not PodFlags(wire.kernel.enrolments.entry(wire.sandbox.cookie).flags) & PodFlags.IPV6  # type: ignore[union-attr]
    assert wire.pod.dial(wire.peer.ip6, 8080) == {"error": DENIED}
    assert wire.peer.dial(wire.pod.ip6, 8080) == {"error": REFUSED}


@pytest.mark.claim("inbound SYNs get a RST")
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_a_denied_inbound_port_is_reset_before_anybody_sees_it(wire: Wire, family: str) -> None:
    wire.mesh(denying(inbound=(8080, 15020)))
    pod = getattr(wire.pod, family)
    assert wire.peer.dial(pod, 8080) == {"error": REFUSED}
    assert wire.peer.dial(pod, 15020) == {"error": REFUSED}
    assert wire.peer.dial(pod, 9090)["who"] == "inbound"
    tally = wire.kernel.tables.tallies.get(wire.key)
    assert tally is not None and list(tally.connections)[-2:] == [0, 2]


@pytest.mark.parametrize("how", ["connected", "unconnected"])
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_datagrams_are_denied_too(wire: Wire, family: str, how: str) -> None:
    wire.enrol(denying(outbound=(5353,)))
    peer = getattr(wire.peer, family)
    assert wire.pod.python(UDP, peer, 5353, how) == DENIED
    assert wire.pod.python(UDP, peer, 5354, how) == "sent"


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_inbound_datagrams_are_denied_too(wire: Wire, family: str) -> None:
    wire.enrol(denying(inbound=(5353,)))
    pod = getattr(wire.pod, family)
    waiting = wire.pod.start([*PYTHON, BOUND, str(pod), "5353", "0.5"], APP)
    assert wire.peer.python(UDP, pod, 5353, "unconnected") == "sent"
    assert waiting.communicate(timeout=5)[0] == "nothing\n"
    waiting = wire.pod.start([*PYTHON, BOUND, str(pod), "5354", "3"], APP)
    assert wire.peer.python(UDP, pod, 5354, "unconnected") == "sent"
    assert waiting.communicate(timeout=5)[0] == "x\n"


def test_what_is_denied_changes_while_the_pod_runs(wire: Wire) -> None:
    policy = CapturePolicy(dual_stack=True, exclude_outbound_ports=frozenset((8080, 15020)))
    wire.mesh(policy)
    before = wire.kernel.policies()
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    assert deny(wire, (8080, 9090), (8080,))
    assert not deny(wire, (8080, 9090), (8080,))
    assert wire.pod.dial(wire.peer.ip4, 8080) == wire.pod.dial(wire.peer.ip4, 9090) == {"error": DENIED}
    assert wire.peer.dial(wire.pod.ip4, 8080) == {"error": REFUSED}
    assert deny(wire)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    assert wire.pod.dial(wire.peer.ip4, 9090)["who"] == "outbound"
    assert wire.kernel.policies() == before
    entry = wire.kernel.tables.pods.get(wire.key)
    assert entry is not None
    rule = wire.kernel.tables.port_rules.get(PortKey(wire.sandbox.cookie, 8080, entry.policy))
    assert rule is not None and PortRule(rule.word) == PortRule.EXCLUDE_OUTBOUND


@pytest.mark.claim("what was denied before stays denied")
def test_ports_for_which_there_is_no_room_change_nothing(wire: Wire) -> None:
    wire.mesh(denying(outbound=(8080,)))
    enrolments, rules = wire.kernel.enrolments, wire.kernel.tables.port_rules
    before = wire.kernel.policies()
    filler = [PortKey(1 + number // 65536, number % 65536) for number in range(rules.limit - before["port_rules"] - 1)]
    try:
        for key in filler:
            rules.put(key, Word(PortRule.EXCLUDE_OUTBOUND))
        with pytest.raises(TableFull, match="BPF map port_rules is full"):
            deny(wire, (9090, 9091, 9092), ())
    finally:
        for key in filler:
            rules.remove(key)
    assert wire.kernel.policies() == before
    assert enrolments.damaged() == {}
    assert wire.pod.dial(wire.peer.ip4, 8080) == {"error": DENIED}
    assert wire.pod.dial(wire.peer.ip4, 9090)["who"] == "outbound"
    assert deny(wire, (9090, 9091, 9092), ())
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert wire.pod.dial(wire.peer.ip4, 9090) == {"error": DENIED}


def test_denied_connections_are_counted(wire: Wire) -> None:
    wire.mesh(denying(outbound=(8080,)))
    for _ in range(3):
        wire.pod.dial(wire.peer.ip4, 8080)
    tally = wire.kernel.tables.tallies.get(wire.key)
    assert tally is not None and list(tally.connections)[-2:] == [3, 0]


def test_nothing_is_sent_to_a_denied_port(wire: Wire) -> None:
    wire.enrol(denying(outbound=(8080,)))
    assert wire.pod.dial("198.51.100.1", 8080) == {"error": DENIED}  # nobody is there: one that was tried would hang
