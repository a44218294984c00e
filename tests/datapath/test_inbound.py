"""Connections that reach a mesh pod from outside, where nothing on the client's side helps."""

import pytest

from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Wire
from tests.lab.inside import PYTHON
from tests.lab.waiting import wait_until

FAMILIES = ["ip4", "ip6"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("port", [8080, 22, 9999, 15001, 15006])
def test_every_port_reaches_the_proxy_with_the_clients_address(wire: Wire, family: str, port: int) -> None:
    wire.mesh()
    target = str(getattr(wire.pod, family))
    seen = wire.peer.dial(target, port)
    assert seen["who"] == "inbound"
    assert seen["peer"][0] == str(getattr(wire.peer, family))
    assert seen["local"] == seen["original"] == seen["client_peer"] == [target, port]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("port", [15020, 15008])
def test_excluded_ports_and_the_tunnel_go_direct(wire: Wire, family: str, port: int) -> None:
    seen = wire.mesh().peer.dial(getattr(wire.pod, family), port)
    assert seen["who"] == "app"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_listed_ports_are_captured_and_the_exclude_list_is_not_read(wire: Wire, family: str) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, inbound_all=False, include_inbound_ports=frozenset({15020})))
    assert wire.peer.dial(getattr(wire.pod, family), 15020)["who"] == "inbound"
    assert wire.peer.dial(getattr(wire.pod, family), 8080)["who"] == "app"


def test_an_empty_list_captures_nothing(wire: Wire) -> None:
    wire.mesh(CapturePolicy(inbound_all=False))
    assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "app"


@pytest.mark.claim("the proxy does not listen, inbound")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_proxy_the_client_is_refused_and_the_app_sees_nothing(wire: Wire, family: str) -> None:
    wire.enrol()
    wire.pod.serve("app", "8080")
    assert wire.peer.dial(getattr(wire.pod, family), 8080) == {"error": "Connection refused"}


@pytest.mark.claim("An application that binds 15006 itself gets nobody's traffic")
def test_an_app_on_the_proxys_port_gets_nobodys_traffic(wire: Wire) -> None:
    wire.enrol()
    wire.pod.serve("impostor", "15006")
    assert wire.peer.dial(wire.pod.ip4, 8080) == {"error": "Connection refused"}


@pytest.mark.parametrize("closed", range(4))
def test_closing_any_one_of_the_workers_listeners_does_not_break_capture(wire: Wire, closed: int) -> None:
    wire.enrol()
    proxy = wire.pod.serve("inbound", "15006x4", uid=PROXY)
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    proxy.stdin.write(f"close 15006 {closed}\n")
    proxy.stdin.flush()
    assert proxy.stdout.readline() == "closed\n"
    for ip in (wire.pod.ip4, wire.pod.ip6):
        assert [wire.peer.dial(ip, 8080)["who"] for _ in range(5)] == ["inbound"] * 5


def test_a_proxy_that_restarts_is_found_again(wire: Wire) -> None:
    wire.mesh()
    wire.pod.stop()
    assert wire.peer.dial(wire.pod.ip4, 8080) == {"error": "Connection refused"}
    wire.pod.serve("second", "15006", uid=PROXY)
    assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "second"


def test_listeners_and_handshakes_leave_nothing_behind(wire: Wire) -> None:
    wire.mesh(workers=4)
    for _ in range(20):
        wire.pod.dial(wire.peer.ip4, 8080)
        wire.peer.dial(wire.pod.ip4, 8080)
    tables, cookie = (
        wire.kernel.tables,
        wire.sandbox.cookie,
    )  # refused ones of other pods stay until they are the oldest
    wait_until(
        lambda: all(key.cookie != cookie for key in tables.handshakes.every_key()), "the last handshake to be taken", 5
    )
    assert sum(key.cookie == cookie for key in tables.listeners.every_key()) == 4
    wire.pod.stop()
    assert all(key.cookie != cookie for key in tables.listeners.every_key())


def test_a_dual_stack_listener_serves_both_families(wire: Wire) -> None:
    wire.enrol()
    code = """
import json, socket
s = socket.socket(socket.AF_INET6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.bind(("::", 15006))
s.listen(8)
print("ready", flush=True)
for _ in range(2):
    c, _ = s.accept()
    c.sendall(json.dumps({"who": "inbound", "local": c.getsockname()[:2]}).encode() + b"\\n")
    c.close()
"""
    wire.pod.start([*PYTHON, code], PROXY)
    assert wire.peer.dial(wire.pod.ip4, 8080)["local"] == [f"::ffff:{wire.pod.ip4}", 8080]
    assert wire.peer.dial(wire.pod.ip6, 8080)["local"] == [str(wire.pod.ip6), 8080]
