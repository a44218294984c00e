"""TPROXY mode with a real Envoy: the application sees the client, and still nothing passes the proxy by."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.envoy import PROXY_ID
from tests.lab.inside import PYTHON
from tests.lab.pod import Pod
from tests.node.conftest import Mesh


@pytest.fixture(scope="module")
def pod(mesh: Mesh) -> Iterator[Pod]:
    pod = mesh.node.pod("transparent", annotations={"sidecar.istio.io/interceptionMode": "TPROXY"})
    yield pod
    pod.stop()


@pytest.mark.parametrize("version", [4, 6])
def test_the_app_sees_the_clients_address(mesh: Mesh, pod: Pod, version: int) -> None:
    index = 0 if version == 4 else 1
    pod.envoy.connections()
    reply = mesh.gamma.curl(pod.ips[index])
    assert (reply.pod, reply.body["peer"]) == ("transparent", str(mesh.gamma.ips[index]))
    connection = pod.envoy.next_connection()
    assert connection.listener == "inbound"
    assert str(mesh.gamma.ips[index]) in connection.source
    assert str(mesh.gamma.ips[index]) in connection.upstream_source


@pytest.mark.parametrize("version", [4, 6])
def test_large_bodies_arrive_whole(mesh: Mesh, pod: Pod, version: int) -> None:
    code = """
import json, sys, urllib.request
host = f"[{sys.argv[1]}]" if ":" in sys.argv[1] else sys.argv[1]
with urllib.request.urlopen(f"http://{host}:8080/?bytes=5000000", timeout=10) as answer:
    print(json.dumps(len(answer.read())))
"""
    assert mesh.gamma.python(code, pod.ips[0 if version == 4 else 1]) == 5_000_000


@pytest.mark.parametrize("version", [4, 6])
def test_the_app_calls_itself_through_its_service(mesh: Mesh, pod: Pod, version: int) -> None:
    """What the proxy sends to its own pod is inbound: once, and to the application."""
    ip = pod.ips[0 if version == 4 else 1]
    pod.envoy.connections()
    code = """
import json, socket, sys
s = socket.create_connection((sys.argv[1], 8080), 5)
s.sendall(b"GET / HTTP/1.1\\r\\nHost: app\\r\\nConnection: close\\r\\n\\r\\n")
print(s.makefile().read().partition("\\n\\n")[2])
"""
    process = pod.popen([*PYTHON, code, str(ip)], uid=0, gid=PROXY_ID, stdout=subprocess.PIPE, text=True)
    assert json.loads(process.communicate(timeout=10)[0])["pod"] == "transparent"
    assert pod.envoy.next_connection().listener == "inbound"


def test_a_refused_app_is_an_error_not_a_hang(mesh: Mesh, pod: Pod) -> None:
    pod.envoy.connections()
    assert mesh.gamma.curl(pod.ip4, 9999).status == 503
    assert pod.envoy.next_connection().listener == "inbound"


def test_outbound_is_captured_as_ever(mesh: Mesh, pod: Pod) -> None:
    pod.envoy.connections()
    assert pod.curl(mesh.gamma.ip4).pod == "gamma"
    assert pod.envoy.next_connection().listener == "outbound"
