"""Istio's own acceptance test, as its init container runs it: before there is an Envoy, with no rights at all.

istio-validation listens on the proxy's two ports on loopback, dials a port that only capture can lead there, and asks
the accepted connection for its original destination. It ends with 126 when that has not worked for five seconds, which
keeps the Pod from starting.
"""

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.chain import Chain
from tests.lab.envoy import PROXY_ID
from tests.lab.inside import PYTHON
from tests.lab.node import Node, make_netns
from tests.lab.pod import Pod

MODE = "sidecar.istio.io/interceptionMode"
EXCLUDED_PORTS = "traffic.sidecar.istio.io/excludeOutboundPorts"
EXCLUDED_INTERFACES = "traffic.sidecar.istio.io/excludeInterfaces"
FAILED = 126
NUMBERS = itertools.count(1)  # a lab's pods need names of their own

# Go asks with an IPv6MTUInfo, 32 bytes, for both families, and only looks at the port.
VALIDATION = """
import json, selectors, socket, struct, sys, time
version, pause = sys.argv[1], float(sys.argv[2])
family, here, there = {
    "4": (socket.AF_INET, "127.0.0.1", "127.0.0.6"),
    "6": (socket.AF_INET6, "::1", "::6"),
}[version]
level = socket.SOL_IP if version == "4" else socket.IPPROTO_IPV6
rights = [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")]
assert int(rights[0], 16) == 0, rights

ready = selectors.DefaultSelector()
for port in (15001, 15006):
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((here, port))
    listener.listen(128)
    ready.register(listener, selectors.EVENT_READ)

for attempt in range(5):
    dialled = socket.socket(family)
    dialled.settimeout(pause)
    dialled.bind((here, 0))
    error = dialled.connect_ex((there, 15002))
    next_attempt = time.monotonic() + pause
    while (left := next_attempt - time.monotonic()) > 0:
        for key, _ in ready.select(left):
            connection = key.fileobj.accept()[0]
            original = connection.getsockopt(level, 80, 32)
            port = struct.unpack("!H", original[2:4])[0]
            if port == 15002:
                print(json.dumps({"listener": key.fileobj.getsockname()[1], "length": len(original),
                                  "local": connection.getsockname()[:2]}))
                sys.exit(0)
print(json.dumps({"error": error}))
sys.exit(126)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as node:
        yield node


MakePod = Callable[..., Pod]


def validate(pod: Pod, version: int, pause: float = 1) -> tuple[int, Any]:
    """Exit status and what it has seen; `pause` are the seconds between two attempts."""
    argv = [*PYTHON, VALIDATION, str(version), str(pause)]
    process = pod.popen(argv, uid=PROXY_ID, stdout=subprocess.PIPE, text=True)
    output = process.communicate(timeout=15)[0]
    return process.returncode, json.loads(output)


def passed(version: int) -> tuple[int, dict[str, object]]:
    """At the first attempt, on the inbound listener, which the connection was not made to."""
    return 0, {
        "listener": 15006,
        "length": 16 if version == 4 else 28,
        "local": ["127.0.0.1" if version == 4 else "::1", 15006],
    }


@pytest.fixture
def make_pod(node: Node) -> Iterator[MakePod]:
    made: list[Pod] = []

    def make(mesh: bool = True, **annotations: str) -> Pod:
        made.append(node.pod(f"pod-{next(NUMBERS)}", mesh, annotations=annotations, app=False, envoy=False))
        return made[-1]

    yield make
    for pod in made:
        pod.stop()


@pytest.fixture
def pod_of_ipv6_only(node: Node, request: pytest.FixtureRequest) -> Iterator[Pod]:
    """As in a cluster without IPv4, where Istio validates with ::1; no ISTIO_DUAL_STACK."""
    conflist = node.conflist()
    ipam = conflist["plugins"][0]["ipam"]
    ipam["ranges"] = ipam["ranges"][1:]
    annotations, env = {MODE: request.param}, {"ISTIO_DUAL_STACK": "false"}
    pod = Pod(node, f"pod-{next(NUMBERS)}", annotations=annotations, proxy_env=env)
    chain = Chain(conflist, node.chain.plugin_dirs, node.netns)
    manifest = node.pods_dir / f"{pod.name}.yaml"
    manifest.write_text(json.dumps(pod.manifest()))
    pod.cgroup.mkdir()
    make_netns(pod.netns)
    result = chain.add(pod.attachment)
    yield pod
    chain.delete(pod.attachment, result)
    subprocess.run(["ip", "netns", "del", pod.netns.name], check=True)
    manifest.unlink()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", ["REDIRECT", "TPROXY"])
def test_it_passes(make_pod: MakePod, mode: str, version: int) -> None:
    assert validate(make_pod(**{MODE: mode}), version) == passed(version)


@pytest.mark.parametrize("pod_of_ipv6_only", ["REDIRECT", "TPROXY"], indirect=True)
def test_it_passes_without_ipv4(pod_of_ipv6_only: Pod) -> None:
    assert validate(pod_of_ipv6_only, 6) == passed(6)


@pytest.mark.parametrize("annotation", [{"sidestep.io/early-outbound": "allow"}, {"sidestep.io/strict-proxy": "true"}])
def test_it_passes_with_what_is_beyond_istio(make_pod: MakePod, annotation: dict[str, str]) -> None:
    """It runs before the proxy, in a container that is not the proxy's."""
    assert validate(make_pod(**annotation), 4) == passed(4)


def test_it_passes_again_and_again(make_pod: MakePod) -> None:
    """A container that is restarted, and leaves nothing behind that would stand in the way of the next."""
    pod = make_pod()
    assert [validate(pod, 4) for _ in range(3)] == [passed(4)] * 3


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("annotation", [{EXCLUDED_PORTS: "15002"}, {EXCLUDED_INTERFACES: "lo"}])
def test_it_fails_when_its_port_or_lo_is_excluded(make_pod: MakePod, annotation: dict[str, str], version: int) -> None:
    assert validate(make_pod(**annotation), version, pause=0.1)[0] == FAILED


@pytest.mark.parametrize("version", [4, 6])
def test_it_fails_in_a_pod_that_is_not_captured(make_pod: MakePod, version: int) -> None:
    """What Istio has it for: the plugin was not there when the pod was made."""
    pod = make_pod(mesh=False)
    assert validate(pod, version, pause=0.1)[0] == FAILED
