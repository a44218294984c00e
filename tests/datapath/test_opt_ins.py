"""What Istio does not have and a Pod can ask for: early outbound, strict proxies."""

import pytest

from bpf.layout import Cookie, Quad
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Wire

EARLY = CapturePolicy(dual_stack=True, early_outbound=True)
STRICT = CapturePolicy(dual_stack=True, strict_proxy=True)


@pytest.mark.claim("it passes until the proxy has listened once")
def test_outbound_passes_until_the_proxy_listens_and_never_again(wire: Wire) -> None:
    wire.enrol(EARLY)
    wire.peer.serve("remote", "8080", uid=0)
    for target in (wire.peer.ip4, wire.peer.ip6):
        assert wire.pod.dial(target, 8080)["who"] == "remote"
    proxy = wire.pod.serve("outbound", "15001", uid=PROXY)
    for target in (wire.peer.ip4, wire.peer.ip6):
        assert wire.pod.dial(target, 8080)["who"] == "outbound"
    proxy.kill()
    proxy.wait()
    assert wire.pod.dial(wire.peer.ip4, 8080) == {"error": "Connection refused"}


def test_an_app_on_the_proxys_port_does_not_end_the_early_phase(wire: Wire) -> None:
    wire.enrol(EARLY)
    wire.peer.serve("remote", "8080", uid=0)
    wire.pod.serve("impostor", "15001")
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"


def test_istio_validation_does_not_end_the_early_phase(wire: Wire) -> None:
    wire.enrol(EARLY)
    wire.peer.serve("remote", "8080", uid=0)
    code = """
import socket
for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
    s = socket.socket(family)
    s.bind((address, 15001))
    s.listen()
print(1)
"""
    wire.pod.python(code, uid=PROXY)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"


def test_inbound_is_captured_from_the_start(wire: Wire) -> None:
    wire.enrol(EARLY)
    wire.pod.serve("app", "8080")
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0) == {"error": "Connection refused"}


def test_without_the_opt_in_outbound_is_refused_from_the_start(wire: Wire) -> None:
    wire.enrol()
    wire.peer.serve("remote", "8080", uid=0)
    assert wire.pod.dial(wire.peer.ip4, 8080) == {"error": "Connection refused"}


def test_nothing_of_an_early_pod_is_left_behind(wire: Wire) -> None:
    wire.enrol(EARLY)
    wire.pod.serve("outbound", "15001", uid=PROXY)
    assert wire.kernel.tables.started.get(Cookie(wire.sandbox.cookie)) is not None
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    assert wire.kernel.tables.started.get(Cookie(wire.sandbox.cookie)) is None


def confirm(wire: Wire, cgroup_id: int) -> None:
    wire.kernel.tables.proxies.put(Cookie(wire.sandbox.cookie), Quad(cgroup_id))


@pytest.mark.claim("the strict proxy's container is not known yet")
@pytest.mark.claim("Until then the proxy's connections are refused")
def test_a_strict_pods_proxy_is_refused_until_its_container_is_known(wire: Wire) -> None:
    wire.mesh(STRICT)
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY) == {"error": "Operation not permitted"}
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"


def test_only_the_proxys_container_escapes_capture(wire: Wire) -> None:
    wire.mesh(STRICT)
    assert wire.pod.cgroup is not None
    confirm(wire, wire.pod.cgroup.stat().st_ino)
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY)["who"] == "remote"
    confirm(wire, 1)
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY)["who"] == "outbound"
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=0, gid=PROXY)["who"] == "outbound"


@pytest.mark.claim("in a strict pod by its container too")
def test_an_impostor_cannot_take_inbound_connections(wire: Wire) -> None:
    wire.enrol(STRICT)
    confirm(wire, 1)
    wire.pod.serve("impostor", "15006", uid=PROXY)
    wire.pod.serve("app", "8080")
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0) == {"error": "Connection refused"}


def test_the_probe_of_istio_validation_is_answered_in_strict_pods(wire: Wire) -> None:
    wire.mesh(STRICT)
    for source, target in (("127.0.0.1", "127.0.0.6"), ("::1", "::6")):
        seen = wire.pod.dial(target, 15002, source, uid=PROXY)
        assert (seen["who"], seen["original"]) == ("inbound", [target, 15002])
