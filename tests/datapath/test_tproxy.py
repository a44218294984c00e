"""TPROXY mode: the application sees the client's address, and the proxy's connection to it does not loop."""

from typing import Any

import pytest

from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Wire

POLICY = CapturePolicy(dual_stack=True, mode="TPROXY")
PROXY_GROUP = 1337

# The proxy's way to the application as Envoy's original_src filter goes it; runs as root with the proxy's group.
DIAL = """
import json, socket, sys
source, target, port, mark = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
six = ":" in target
s = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
s.settimeout(2)
s.setsockopt(*((socket.IPPROTO_IPV6, 75, 1) if six else (socket.SOL_IP, socket.IP_TRANSPARENT, 1)))
s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
s.bind((source, 0))
try:
    s.connect((target, port))
    answers = s.makefile()
    seen = json.loads(answers.readline())
    s.send(b"x")
    again = json.loads(answers.readline())
    assert again == seen
    print(json.dumps({**seen, "local_name": s.getsockname()[:2]}))
except OSError as error:
    print(json.dumps({"error": error.strerror or str(error)}))
"""


@pytest.fixture
def mesh(wire: Wire) -> Wire:
    """The pod in TPROXY mode; its proxy runs as root with group 1337, as Istio's injector has it."""
    wire.enrol(POLICY)
    wire.pod.serve("outbound", "15001", uid=0, gid=PROXY_GROUP)
    wire.pod.serve("inbound", "15006x2", uid=0, gid=PROXY_GROUP)
    wire.pod.serve("app", "8080", "15008", "15020")
    wire.peer.serve("remote", "8080", uid=0)
    return wire


def by_proxy(wire: Wire, source: object, target: object, port: int = 8080, mark: int = 1337) -> Any:
    return wire.pod.python(DIAL, source, target, port, mark, uid=0, gid=PROXY_GROUP)


FAMILIES = ["ip4", "ip6"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proxy_reaches_the_app_with_the_clients_address(mesh: Wire, family: str) -> None:
    client, pod = getattr(mesh.peer, family), getattr(mesh.pod, family)
    seen = by_proxy(mesh, client, pod)
    assert (seen["who"], seen["peer"][0], seen["local"]) == ("app", str(client), [str(pod), 8080])
    assert seen["peer"] == seen["local_name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_inbound_still_goes_to_the_proxy_while_it_dials_the_app(mesh: Wire, family: str) -> None:
    client, pod = getattr(mesh.peer, family), getattr(mesh.pod, family)
    by_proxy(mesh, client, pod)
    seen = mesh.peer.dial(pod, 8080, uid=0)
    assert (seen["who"], seen["local"], seen["original"]) == ("inbound", [str(pod), 8080], [str(pod), 8080])


def test_nothing_of_a_closed_or_refused_dial_is_left(mesh: Wire) -> None:
    dials = mesh.kernel.tables.dials
    assert by_proxy(mesh, mesh.peer.ip4, mesh.pod.ip4)["who"] == "app"
    assert by_proxy(mesh, mesh.peer.ip4, mesh.pod.ip4, port=9999) == {"error": "Connection refused"}
    assert not list(dials.every_key())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tunnel_port_is_captured(mesh: Wire, family: str) -> None:
    assert mesh.peer.dial(getattr(mesh.pod, family), 15008, uid=0)["who"] == "inbound"
    assert mesh.peer.dial(getattr(mesh.pod, family), 15020, uid=0)["who"] == "app"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_self_call_of_a_proxy_known_by_its_group_is_inbound(mesh: Wire, family: str) -> None:
    target = getattr(mesh.pod, family)
    seen = mesh.pod.dial(target, 8080, uid=0, gid=PROXY_GROUP)
    assert (seen["who"], seen["original"], seen["peer"][0]) == ("inbound", [str(target), 8080], str(target))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_app_calling_itself_stays_direct(mesh: Wire, family: str) -> None:
    assert mesh.pod.dial(getattr(mesh.pod, family), 8080)["who"] == "app"


@pytest.mark.parametrize(("source", "family"), [("127.0.0.6", "ip4"), ("::6", "ip6")])
def test_probes_from_the_inbound_source_reach_the_app(mesh: Wire, source: str, family: str) -> None:
    assert mesh.pod.dial(getattr(mesh.pod, family), 8080, source, uid=0, gid=PROXY_GROUP)["who"] == "app"


@pytest.mark.parametrize("family", FAMILIES)
def test_outbound_is_as_in_redirect_mode(mesh: Wire, family: str) -> None:
    target = getattr(mesh.peer, family)
    assert mesh.pod.dial(target, 8080)["who"] == "outbound"
    assert mesh.pod.dial(target, 8080, uid=0, gid=PROXY_GROUP)["who"] == "remote"


def test_an_app_cannot_mark_its_way_past_the_proxy(mesh: Wire) -> None:
    """Whoever marks a socket like the proxy's, but is not the proxy, is captured outbound as ever."""
    code = DIAL.replace("s.bind((source, 0))", "")
    seen = mesh.pod.python(code, "", mesh.peer.ip4, 8080, 1337, uid=0)
    assert seen["who"] == "outbound"


def test_the_probe_of_istio_validation_is_answered(mesh: Wire) -> None:
    for source, target in (("127.0.0.1", "127.0.0.6"), ("::1", "::6")):
        seen = mesh.pod.dial(target, 15002, source, uid=PROXY)
        assert (seen["who"], seen["original"]) == ("inbound", [target, 15002])
