"""Ambient mode: what the programs do for a pod whose proxy is the node's ztunnel, by a double of it."""

from collections.abc import Callable
from typing import Any

import pytest

from cni.netns.listeners import Ztunnel
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import CapturePolicy
from tests.datapath.adopting import Parts
from tests.datapath.ambient import Ztunnels, in_ambient
from tests.datapath.wires import Namespace, Wire
from tests.lab.inside import PYTHON
from tests.lab.waiting import wait_until
from tests.lab.ztunnel import Told

FAMILIES = ["ip4", "ip6"]
DNS = AmbientPolicy(dns_capture=True)

# asks a nameserver once, connected or not; prints who has answered, as whom
ASK = """
import json, socket, sys
server, port, mark, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
s = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(2)
if mark:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
try:
    if how == "connected":
        s.connect((server, port))
        s.send(b"who?")
    else:
        s.sendto(b"who?", (server, port))
    said, sender = s.recvfrom(512)
    print(json.dumps({**json.loads(said), "from": sender[:2]}))
except OSError as error:
    print(json.dumps({"error": error.strerror or str(error)}))
"""
# connects with a mark, as a container can that has CAP_NET_RAW
MARKED = """
import json, socket, sys
host, port, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
s.settimeout(3)
s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
try:
    s.connect((host, port))
    print(s.makefile().readline())
except OSError as error:
    print(json.dumps({"error": error.strerror or str(error)}))
"""
# listens on ztunnel's port with ztunnel's mark, and never accepts
PRETEND = """
import socket, sys
s = socket.socket(socket.AF_INET6)
s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind(("::", 15006))
s.listen(8)
print("ready", flush=True)
sys.stdin.read()
"""
NAMESERVER = """
import json, socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.bind(("::", 53))
print("ready", flush=True)
while True:
    query, peer = s.recvfrom(512)
    s.sendto(json.dumps({"who": "nameserver"}).encode(), peer)
"""
# asks for the application behind ztunnel's tunnel, as the double has it
TUNNELLING = """
import socket, sys
s = socket.create_connection((sys.argv[1], 15008), 3)
s.sendall(b"8080\\n")
print(s.makefile().readline())
"""
REFUSED = {"error": "Connection refused"}


@pytest.fixture
def ztunnel(ztunnels: Ztunnels) -> Told:
    """One that serves nobody yet."""
    return ztunnels.start()


@pytest.fixture
def mesh(wire: Wire, ztunnel: Told) -> Wire:
    """A pod with DNS capture that ztunnel serves."""
    in_ambient(wire, DNS)
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    return wire


def marked(end: Namespace, host: object, port: int, mark: int) -> Any:
    """What a root process sees that has marked its socket."""
    return end.python(MARKED, host, port, mark, uid=0)


def ask(end: Namespace, server: object, how: str = "unconnected", mark: int = 0, port: int = 53) -> Any:
    """Who answers a datagram."""
    return end.python(ASK, server, port, mark, how, uid=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_leaves_the_pod_goes_through_ztunnel(mesh: Wire, family: str) -> None:
    peer, pod = getattr(mesh.peer, family), getattr(mesh.pod, family)
    seen = mesh.pod.dial(peer, 9090)
    assert (seen["who"], seen["original"], seen["peer"][0]) == ("ztunnel-outbound", [str(peer), 9090], str(pod))
    assert seen["client_peer"] == [str(peer), 9090]
    assert (seen["then"]["who"], seen["then"]["peer"][0]) == ("remote", str(pod))


def test_an_ipv4_address_is_captured_on_a_socket_of_ipv6(mesh: Wire) -> None:
    seen = mesh.pod.dial(f"::ffff:{mesh.peer.ip4}", 9090)
    assert (seen["who"], seen["original"]) == ("ztunnel-outbound", [str(mesh.peer.ip4), 9090])


@pytest.mark.parametrize("family", FAMILIES)
def test_inbound_plaintext_reaches_the_app_through_ztunnel_from_the_clients_address(mesh: Wire, family: str) -> None:
    peer, pod = getattr(mesh.peer, family), getattr(mesh.pod, family)
    seen = mesh.peer.dial(pod, 8080, uid=0)
    assert (seen["who"], seen["original"], seen["peer"][0]) == ("ztunnel-inbound", [str(pod), 8080], str(peer))
    assert seen["peer"] == seen["client_local"]
    assert (seen["then"]["who"], seen["then"]["peer"][0]) == ("app", str(peer))
    assert seen["then"]["local"] == [str(pod), 8080]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_port_but_the_tunnels_is_spared_inbound(mesh: Wire, family: str) -> None:
    pod = getattr(mesh.pod, family)
    assert mesh.peer.dial(pod, 15020, uid=0)["then"]["who"] == "app"
    assert mesh.peer.dial(pod, 9999, uid=0)["then"] == REFUSED
    assert "error" in mesh.peer.dial(pod, 15053, uid=0)["then"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tunnel_arrives_at_ztunnels_own_port(mesh: Wire, family: str) -> None:
    target = getattr(mesh.pod, family)
    seen = mesh.peer.python(TUNNELLING, target, uid=0)
    assert (seen["who"], seen["local"]) == ("ztunnel-tunnel", [str(target), 15008])
    assert (seen["then"]["who"], seen["then"]["peer"][0]) == ("app", str(getattr(mesh.peer, family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_app_calling_itself_stays_direct(mesh: Wire, family: str) -> None:
    loopback = "127.0.0.1" if family == "ip4" else "::1"
    for target in (getattr(mesh.pod, family), loopback, *(["127.0.0.5"] if family == "ip4" else [])):
        assert mesh.pod.dial(target, 8080)["who"] == "app"


@pytest.mark.parametrize("how", ["connected", "unconnected"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dns_goes_to_ztunnels_resolver(mesh: Wire, family: str, how: str) -> None:
    peer = getattr(mesh.peer, family)
    seen = ask(mesh.pod, peer, how)
    assert (seen["who"], seen["from"]) == ("ztunnel-dns", [str(peer), 53])
    assert mesh.pod.dial(peer, 53)["who"] == "ztunnel-dns"
    assert mesh.pod.dial(getattr(mesh.pod, family), 53)["who"] == "ztunnel-dns"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dns_capture_datagrams_pass_and_tcp_is_as_any_other(wire: Wire, ztunnel: Told, family: str) -> None:
    in_ambient(wire)
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    wire.peer.start(_python(NAMESERVER), 0)
    peer = getattr(wire.peer, family)
    assert ask(wire.pod, peer)["who"] == "nameserver"
    seen = wire.pod.dial(peer, 53)
    assert (seen["who"], seen["then"]["who"]) == ("ztunnel-outbound", "remote")


@pytest.mark.claim("become ztunnel in ambient mode by setting its mark")
@pytest.mark.parametrize("mark", [0x539, 0x111])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_container_that_marks_its_sockets_is_captured_all_the_same(mesh: Wire, family: str, mark: int) -> None:
    mesh.peer.start(_python(NAMESERVER), 0)
    peer = getattr(mesh.peer, family)
    assert marked(mesh.pod, peer, 9090, mark)["who"] == "ztunnel-outbound"
    assert marked(mesh.pod, peer, 53, mark)["who"] == "ztunnel-dns"
    assert ask(mesh.pod, peer, mark=mark)["who"] == "ztunnel-dns"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_that_trusts_the_mark_lets_it_pass_as_istios_rules_do(wire: Wire, ztunnel: Told, family: str) -> None:
    in_ambient(wire, AmbientPolicy(dns_capture=True, trust_mark=True))
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    wire.peer.start(_python(NAMESERVER), 0)
    peer = getattr(wire.peer, family)
    assert marked(wire.pod, peer, 9090, 0x539)["who"] == "remote"
    assert marked(wire.pod, peer, 53, 0x539)["who"] == "remote"
    assert ask(wire.pod, peer, mark=0x539)["who"] == "nameserver"
    assert wire.pod.dial(peer, 9090)["who"] == "ztunnel-outbound"


@pytest.mark.claim("or take its inbound connections by listening beside it")
def test_a_container_that_pretends_to_be_ztunnel_gets_no_inbound_connection(mesh: Wire) -> None:
    mesh.pod.start(_python(PRETEND), 0)
    for _ in range(20):
        assert mesh.peer.dial(mesh.pod.ip4, 8080, uid=0)["then"]["who"] == "app"


@pytest.mark.claim("connections are refused both ways")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_ztunnel_nothing_goes_either_way(wire: Wire, ztunnel: Told, family: str) -> None:
    in_ambient(wire)
    peer, pod = getattr(wire.peer, family), getattr(wire.pod, family)
    assert wire.pod.dial(peer, 9090) == wire.peer.dial(pod, 8080, uid=0) == REFUSED
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    assert wire.pod.dial(peer, 9090)["who"] == "ztunnel-outbound"
    assert wire.peer.dial(pod, 8080, uid=0)["who"] == "ztunnel-inbound"
    ztunnel.stop()
    assert wire.pod.dial(peer, 9090) == wire.peer.dial(pod, 8080, uid=0) == REFUSED


@pytest.mark.claim("connections with its mark that leave the pod: EPERM; inbound ones: RST")
def test_a_ztunnel_that_is_not_known_gets_nothing_and_sends_nothing(wire: Wire, ztunnels: Ztunnels) -> None:
    """Not even back to itself: that would never end."""
    in_ambient(wire)
    assert ztunnels.start(is_known=False).add("uid", wire.pod.path) == "ok"
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0) == REFUSED
    seen = wire.pod.dial(wire.peer.ip4, 9090)
    assert (seen["who"], seen["then"]) == ("ztunnel-outbound", {"error": "Operation not permitted"})


@pytest.mark.parametrize("family", FAMILIES)
def test_either_ztunnel_serves_while_one_replaces_the_other(
    mesh: Wire, ztunnels: Ztunnels, ztunnel: Told, family: str
) -> None:
    peer, pod = getattr(mesh.peer, family), getattr(mesh.pod, family)
    successor = ztunnels.start()
    assert successor.add("uid", mesh.pod.path) == "ok"
    for _ in range(10):
        assert mesh.pod.dial(peer, 9090)["then"]["who"] == "remote"
        assert mesh.peer.dial(pod, 8080, uid=0)["then"]["who"] == "app"
    ztunnel.remove("uid")
    for _ in range(5):
        assert mesh.pod.dial(peer, 9090)["pid"] == successor.pid
        assert mesh.peer.dial(pod, 8080, uid=0)["pid"] == successor.pid
    successor.stop()
    assert mesh.pod.dial(peer, 9090) == mesh.peer.dial(pod, 8080, uid=0) == REFUSED


@pytest.mark.parametrize("family", FAMILIES)
def test_ingress_mode_leaves_inbound_alone_and_outbound_as_it_is(wire: Wire, ztunnel: Told, family: str) -> None:
    in_ambient(wire, AmbientPolicy(bypass_inbound_capture=True))
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    seen = wire.peer.dial(getattr(wire.pod, family), 8080, uid=0)
    assert (seen["who"], seen["peer"][0]) == ("app", str(getattr(wire.peer, family)))
    assert wire.pod.dial(getattr(wire.peer, family), 9090)["who"] == "ztunnel-outbound"


def test_ipv6_that_is_switched_off_is_left_alone(wire: Wire, ztunnel: Told) -> None:
    in_ambient(wire, AmbientPolicy(ipv6=False))
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    assert wire.pod.dial(wire.peer.ip6, 9090)["who"] == "remote"
    assert wire.peer.dial(wire.pod.ip6, 8080, uid=0)["who"] == "app"
    assert wire.pod.dial(wire.peer.ip4, 9090)["who"] == "ztunnel-outbound"


def test_pods_with_a_sidecar_are_served_by_it_beside_pods_in_ambient_mode(
    make_wire: Callable[[], Wire], ztunnel: Told
) -> None:
    ambient, sidecar = in_ambient(make_wire()), make_wire().mesh(CapturePolicy(dual_stack=True))
    assert ztunnel.add("uid", ambient.pod.path) == "ok"
    for _ in range(3):
        assert ambient.pod.dial(ambient.peer.ip4, 9090)["who"] == "ztunnel-outbound"
        assert ambient.peer.dial(ambient.pod.ip4, 8080, uid=0)["who"] == "ztunnel-inbound"
        assert sidecar.pod.dial(sidecar.peer.ip4, 9090)["who"] == "outbound"
        assert sidecar.peer.dial(sidecar.pod.ip4, 8080, uid=0)["who"] == "inbound"
        assert sidecar.peer.dial(sidecar.pod.ip4, 15020, uid=0)["who"] == "app"


def test_a_user_with_the_id_of_sidecars_is_captured(mesh: Wire) -> None:
    assert mesh.pod.dial(mesh.peer.ip4, 9090, uid=1337)["who"] == "ztunnel-outbound"


def test_nothing_of_closed_and_refused_dials_is_left(mesh: Wire) -> None:
    mesh.peer.dial(mesh.pod.ip4, 8080, uid=0)
    mesh.peer.dial(mesh.pod.ip4, 9999, uid=0)
    wait_until(lambda: not list(mesh.kernel.tables.dials.every_key()), "the records of closed connections to go")


def test_a_released_pod_is_not_captured(mesh: Wire, agent: Parts) -> None:
    assert agent.admission.release(mesh.sandbox.cookie)
    assert mesh.pod.dial(mesh.peer.ip4, 9090)["who"] == "remote"
    assert mesh.peer.dial(mesh.pod.ip4, 8080, uid=0)["who"] == "app"
    assert not agent.admission.release(mesh.sandbox.cookie)


@pytest.mark.parametrize("family", FAMILIES)
def test_sockets_that_ztunnel_had_before_are_heard(wire: Wire, ztunnel: Told, agent: Parts, family: str) -> None:
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    in_ambient(wire)
    target = getattr(wire.pod, family)
    assert wire.peer.dial(target, 8080, uid=0) == REFUSED
    with wire.pod.path.open() as netns:
        cookie, known = wire.sandbox.cookie, agent.enrolments.ztunnels()
        assert agent.hearing.hear(Ztunnel(cookie, known - known), netns.fileno()) == 0
        assert agent.hearing.hear(Ztunnel(cookie, known), netns.fileno()) == 1
    assert wire.peer.dial(target, 8080, uid=0)["then"]["who"] == "app"
    assert wire.pod.dial(getattr(wire.peer, family), 9090)["then"]["who"] == "remote"


def _python(code: str) -> list[str]:
    return [*PYTHON, code]
