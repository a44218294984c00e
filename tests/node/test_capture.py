"""Who gets each connection: real HTTP through real Envoys, as in the demo and beyond it."""

import pytest

from tests.lab.curl import REFUSED, curl, host
from tests.lab.demo import Probe, probes, run
from tests.lab.envoy import PROXY_ID
from tests.lab.pod import APP_PORT
from tests.node.conftest import Mesh


def test_every_connection_of_the_demo_is_as_expected(mesh: Mesh) -> None:
    rows = [run(probe, (mesh.alpha, mesh.beta)) for probe in probes(mesh.node, mesh.alpha, mesh.beta, mesh.gamma)]
    assert len(rows) == 18
    assert [row for row in rows if row.wrong] == []


def test_the_demos_check_fails_when_the_path_is_another(mesh: Mesh) -> None:
    """The demo's own verdict can say no: a connection that passes both proxies is not one that passes none."""
    request = Probe("alpha app", lambda: mesh.alpha.curl(mesh.beta.ip4), mesh.beta, mesh.beta.ip4, "", ())
    wrong = run(request, (mesh.alpha, mesh.beta)).wrong
    assert any(text.startswith("passed [") for text in wrong)


@pytest.mark.parametrize("version", [4, 6])
def test_envoys_own_connections_pass_it_once(mesh: Mesh, version: int) -> None:
    ip = mesh.gamma.ips[0 if version == 4 else 1]
    for pod in (mesh.alpha, mesh.beta):
        pod.envoy.connections()
    assert mesh.alpha.curl(ip).pod == "gamma"
    assert mesh.alpha.envoy.next_connection().listener == "outbound"
    assert mesh.beta.envoy.connections() == []


def test_an_ipv4_mapped_client_is_captured_as_ipv4(mesh: Mesh) -> None:
    mesh.alpha.envoy.connections()
    seen = mesh.alpha.python(
        """
import json, socket, sys
s = socket.socket(socket.AF_INET6)
s.connect(("::ffff:" + sys.argv[1], 8080))
s.sendall(b"GET / HTTP/1.1\\r\\nHost: app\\r\\nConnection: close\\r\\n\\r\\n")
body = s.makefile().read().partition("\\n\\n")[2]
print(json.dumps([json.loads(body)["pod"], s.getpeername()[:2]]))
""",
        mesh.beta.ip4,
    )
    assert seen == ["beta", [f"::ffff:{mesh.beta.ip4}", 8080]]
    connection = mesh.alpha.envoy.next_connection()
    assert connection.original == f"{mesh.beta.ip4}:8080"
    assert connection.source.startswith(f"{mesh.alpha.ip4}:")


@pytest.mark.claim("for which Istio's Envoy has a black hole")
def test_a_direct_connection_to_the_proxys_port_is_black_holed_not_looped(mesh: Mesh) -> None:
    for pod in (mesh.alpha, mesh.beta):
        pod.envoy.connections()
    reply = mesh.gamma.curl(mesh.beta.ip4, 15006)
    assert reply.pod is None
    connection = mesh.beta.envoy.next_connection()
    while connection.original.endswith(f":{APP_PORT}"):  # of a request before, told late
        connection = mesh.beta.envoy.next_connection()
    assert connection.upstream in ("", "None", "-")


@pytest.mark.parametrize("version", [4, 6])
def test_captured_inbound_with_envoy_stopped_is_refused_and_with_envoy_back_is_served(mesh: Mesh, version: int) -> None:
    ip = mesh.beta.ips[0 if version == 4 else 1]
    mesh.beta.envoy.stop()
    try:
        for reply in (
            mesh.gamma.curl(ip),
            curl(mesh.node.netns, None, f"http://{host(ip)}:{APP_PORT}/", 0, 0),
        ):
            assert reply.exit_code == REFUSED, reply
            assert reply.pod is None
    finally:
        mesh.beta.envoy.start()
    assert mesh.gamma.curl(ip).pod == "beta"


def test_outbound_with_envoy_stopped_is_refused(mesh: Mesh) -> None:
    mesh.alpha.envoy.stop()
    try:
        assert mesh.alpha.curl(mesh.gamma.ip4).exit_code == REFUSED
        assert mesh.alpha.curl(mesh.gamma.ip4, uid=PROXY_ID).pod == "gamma"
    finally:
        mesh.alpha.envoy.start()


def test_large_bodies_arrive_whole(mesh: Mesh) -> None:
    reply = curl(mesh.alpha.netns, mesh.alpha.cgroup, f"http://{mesh.beta.ip4}:{APP_PORT}/?bytes=5000000", 1000, 1000)
    assert reply.body == "x" * 5_000_000


def test_annotations_decide(mesh: Mesh) -> None:
    pod = mesh.node.pod(
        "delta",
        annotations={
            "traffic.sidecar.istio.io/excludeOutboundIPRanges": f"{mesh.gamma.ip4}/32",
            "traffic.sidecar.istio.io/includeInboundPorts": "9999",
        },
    )
    try:
        assert pod.curl(mesh.gamma.ip4).pod == "gamma"
        assert mesh.gamma.curl(pod.ip4).pod == "delta"
        assert pod.envoy.connections() == []
        assert pod.curl(mesh.beta.ip4).pod == "beta"
        assert pod.envoy.next_connection().listener == "outbound"
        assert mesh.gamma.curl(pod.ip4, 9999).pod is None
        assert pod.envoy.next_connection().listener == "inbound"
    finally:
        pod.stop()
