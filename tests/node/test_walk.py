"""`sidestep explain POD POD[:PORT]`: both legs are walked, and the first step that is wrong is named in words."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from bpf.pins import Pins
from tests.lab import invocation
from tests.lab.command import tracing
from tests.lab.envoy import PROXY_ID
from tests.lab.inside import PYTHON
from tests.lab.node import Node
from tests.lab.pod import APP_ID, Pod
from tests.lab.waiting import wait_until
from tests.node.sidestep import document, sidestep
from tests.node.test_strays import stray
from tests.node.test_unsteered import unsteer

TRAFFIC = "traffic.sidecar.istio.io/"
# listens on an address and port until it is killed
LISTEN = """
import signal, socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
signal.pause()
"""
# takes datagrams, likewise
TAKE_DATAGRAMS = """
import signal, socket, sys
taking = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
taking.bind((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
signal.pause()
"""
FLOOD = """
import socket, sys
print("ready", flush=True)
while True:
    with socket.socket() as s:
        s.connect_ex((sys.argv[1], 8080))
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod("alpha")
        made.pod("beta")
        made.pod("bare", envoy=False, app=False)
        yield made


@contextmanager
def running(pod: Pod, code: str, *argv: object, uid: int = APP_ID) -> Iterator[None]:
    process = pod.popen([*PYTHON, code, *map(str, argv)], uid=uid, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


def walked(node: Node, *argv: object, status: int) -> Any:
    return document(node, "explain", *argv, status=status)


def wrong(found: Any) -> list[tuple[str, str]]:
    return [(each["who"], each["what"]) for each in found["steps"] if each["state"] == "wrong"]


def test_both_legs_are_walked_to_the_application(node: Node) -> None:
    beta = node.pods["beta"]
    found = walked(node, "alpha", "beta:8080", status=0)
    assert [each["who"] for each in found["steps"]] == [
        "client",
        "its proxy",
        "the way",
        "server",
        "its proxy",
        "application",
    ]
    assert {each["state"] for each in found["steps"]} == {"ok"}
    lines = sidestep(node, "explain", "alpha", "default/beta:8080").stdout.splitlines()
    assert lines[:3] == [
        f"default/alpha → default/beta, {beta.ip4}:8080 (TCP)",
        f"OK: {beta.ip4}:8080 should be reached",
        "✓ client       captured, rule O10: its address is in an included range",
    ]


def test_nobody_listens_behind_the_proxy(node: Node) -> None:
    found = walked(node, "alpha", "beta:9999", status=1)
    assert found["headline"] == "WRONG: nobody listens on 9999 behind the proxy"
    assert wrong(found) == [("application", "nobody listens on 9999 behind the proxy")]


def test_the_far_end_of_a_datagram_is_looked_at(node: Node) -> None:
    beta = node.pods["beta"]
    for asked in (("beta:7000/udp",), ("beta:7000", "--udp")):
        found = walked(node, "alpha", *asked, status=1)
        assert found["headline"] == "WRONG: nobody listens on UDP port 7000"
    with running(beta, LISTEN, "0.0.0.0", 7000):  # by TCP, which is no help
        assert walked(node, "alpha", "beta:7000/udp", status=1)["state"] == "wrong"
    with running(beta, TAKE_DATAGRAMS, "127.0.0.1", 7000):
        found = walked(node, "alpha", "beta:7000/udp", status=1)
        assert found["headline"] == "WRONG: nobody listens on UDP port 7000 at the pod's address, only at 127.0.0.1"
    for address in ("0.0.0.0", "::"):
        with running(beta, TAKE_DATAGRAMS, address, 7000):
            found = walked(node, "alpha", "beta:7000/udp", "--try", status=0)
            own = sidestep(node, "explain", "beta", "--inbound", node.pods["alpha"].ip4, "--port", 7000, "--udp")
            afar = sidestep(node, "explain", "alpha", f"{beta.ip4}:7000", "--udp")
        assert afar.stdout.endswith("(whether somebody takes datagrams there is not known)\n")
        assert found["headline"] == f"OK: {beta.ip4}:7000 should be reached"
        assert (found["steps"][-1]["who"], found["steps"][-1]["what"]) == ("application", "listens on UDP port 7000")
        assert "  goes to     its own port (somebody listens)\n" in own.stdout


def test_the_port_of_an_application_that_takes_datagrams_is_found(node: Node) -> None:
    with (
        running(node.pods["bare"], TAKE_DATAGRAMS, "0.0.0.0", 7000),
        running(node.pods["bare"], LISTEN, "0.0.0.0", 7001),
    ):
        assert walked(node, "alpha", "bare", "--udp", status=0)["port"] == 7000
    none = sidestep(node, "explain", "alpha", "bare", "--udp")
    assert none.stderr == "sidestep: give default/bare:PORT: its application listens on no UDP port\n"


def test_a_captured_query_goes_to_the_pods_own_resolver_if_that_is_there(node: Node) -> None:
    asks = node.pod("asks", proxy_env={"ISTIO_META_DNS_CAPTURE": "true"}, envoy=False, app=False)
    try:
        for asked, port in (("beta:53/udp", "UDP port 15053"), ("beta:53", "15053")):
            found = walked(node, "asks", asked, status=1)
            assert found["headline"] == f"WRONG: nobody listens on {port}, so the query is refused"
        with running(asks, TAKE_DATAGRAMS, "127.0.0.1", 15053):
            found = walked(node, "asks", "beta:53/udp", status=0)
        assert found["headline"] == f"OK: pilot-agent's resolver gets it, and not {node.pods['beta'].ip4}:53"
        assert [each["who"] for each in found["steps"]] == ["client", "its resolver"]
    finally:
        asks.stop()


def test_an_application_on_loopback_alone_may_not_be_reached(node: Node) -> None:
    with running(node.pods["beta"], LISTEN, "127.0.0.1", 7000):
        found = walked(node, "alpha", "beta:7000", status=3)
    assert "listens on 7000 at 127.0.0.1 only; a proxy dials the pod's address, unless" in found["headline"]


def test_no_proxy_and_a_proxy_of_another_user(node: Node) -> None:
    bare = node.pods["bare"]
    assert wrong(walked(node, "alpha", "bare:8080", status=1))[0] == (
        "its proxy",
        "no proxy listens on 15006, so inbound connections are refused",
    )
    with running(bare, LISTEN, "0.0.0.0", 15006):
        words = f"uid {APP_ID} listens on 15006, the proxy is uid {PROXY_ID} by the Pod"
        assert wrong(walked(node, "alpha", "bare:8080", status=1))[0] == ("its proxy", words)
        assert f"proxy         {words}" in sidestep(node, "pods", "bare").stdout
        said = sidestep(node, "explain", "bare", "--inbound", node.pods["alpha"].ip4, "--port", "8080").stdout
        assert f"  but         {words}\n" in said
    with running(bare, LISTEN, "0.0.0.0", 15001):
        words = f"uid {APP_ID} listens on 15001, the proxy is uid {PROXY_ID} by the Pod"
        assert wrong(walked(node, "bare", "beta:8080", status=1)) == [("its proxy", words)]
    assert ("its proxy", "nobody listens on 15001, so the connection is refused") in wrong(
        walked(node, "bare", "beta:8080", status=1)
    )


def test_processes_outside_of_the_attach_point(node: Node) -> None:
    outside = node.cgroup / "outside"
    outside.mkdir()
    with stray(node.pods["alpha"], outside) as pid:
        found = walked(node, "alpha", "beta:8080", status=1)
    assert found["headline"].startswith(f"WRONG: processes of this pod are outside of the attach point: {pid} sleep")


def test_a_server_that_is_not_steered_and_one_that_denies(node: Node) -> None:
    delta = node.pod("delta", annotations={"sidestep.io/deny-inbound-ports": "23"})
    assert wrong(walked(node, "alpha", "delta:23", status=1))[0] == (
        "server",
        "denied, rule deny: the pod denies this port, no matter who connects",
    )
    node.agent.kill()
    unsteer(node, delta)
    found = walked(node, "alpha", "delta:8080", status=1)
    node.agent.start()
    assert found["headline"] == "WRONG: not steered: inbound reaches the application"
    delta.stop()


def test_a_pod_outside_of_the_mesh_is_walked_to_as_well(node: Node) -> None:
    gamma = node.pod("gamma", mesh=False)
    manifest = gamma.manifest() | {"status": {"phase": "Running", "podIP": str(gamma.ip4)}}
    (node.pods_dir / "gamma.yaml").write_text(yaml.safe_dump(manifest))
    found = walked(node, "alpha", "gamma:8080", status=0)
    assert [(each["who"], each["state"]) for each in found["steps"]][-2:] == [
        ("server", "note"),
        ("application", "ok"),
    ]
    assert wrong(walked(node, "alpha", "gamma:9999", status=1)) == [("application", "nobody listens on 9999")]
    refused = sidestep(node, "explain", "gamma", "beta:8080")
    reason = "default/gamma is not captured: there is no istio-proxy container"
    assert (refused.returncode, refused.stderr) == (1, f"sidestep: {reason}\n")
    gamma.stop()


def test_without_a_port_it_is_the_applications_if_that_is_one(node: Node) -> None:
    with running(node.pods["bare"], LISTEN, "0.0.0.0", 7000):
        assert walked(node, "alpha", "bare", status=1)["port"] == 7000
    several = sidestep(node, "explain", "alpha", "beta")
    assert several.stderr == "sidestep: give default/beta:PORT: its application listens on 8080, 9001\n"
    none = sidestep(node, "explain", "alpha", "bare")
    assert none.stderr == "sidestep: give default/bare:PORT: its application listens on no port\n"


def test_a_pod_of_another_node_is_named_with_what_to_do(node: Node) -> None:
    done = sidestep(node, "explain", "alpha", "reviews.default.svc:9080")
    assert done.returncode == 1
    assert "no enrolled pod is called reviews.default.svc" in done.stderr
    assert "names of hosts and Services are not looked up" in done.stderr


def test_misspelt_annotations_are_named_with_what_was_meant(node: Node) -> None:
    name = f"{TRAFFIC}includeOutboundIPRange"
    words = f"unknown annotation {name}, did you mean includeOutboundIPRanges"
    epsilon = node.pod("epsilon", annotations={name: "10.0.0.0/8"})
    found = walked(node, "epsilon", "beta:8080", status=0)
    assert ("client", "note", words) in [(each["who"], each["state"], each["what"]) for each in found["steps"]]
    single = sidestep(node, "explain", "epsilon", "192.0.2.1:80").stdout
    assert f"  annotation  {words}\n" in single
    assert words in sidestep(node, "pods", "epsilon").stdout
    epsilon.stop()


def test_trying_makes_exactly_one_connection_even_in_a_busy_pod(node: Node) -> None:
    alpha, beta = node.pods["alpha"], node.pods["beta"]
    with running(alpha, FLOOD, beta.ip4):
        alpha.envoy.connections()
        found = walked(node, "alpha", "beta:9001", "--try", status=0)
        assert found["try"]["agrees"], found
        seen: list[str] = []

        def logged() -> bool:
            seen.extend(each.original for each in alpha.envoy.connections())
            return f"{beta.ip4}:9001" in seen

        wait_until(logged, "the connection in the proxy's log")
    alpha.envoy.stop()  # which writes the rest
    alpha.envoy.start()
    seen += [each.original for each in alpha.envoy.connections()]
    assert seen.count(f"{beta.ip4}:9001") == 1


def test_trying_makes_exactly_one_inbound_connection(node: Node) -> None:
    def captured() -> int:
        return int(document(node, "pods", "alpha")["connections"]["inbound"]["captured"])

    before = captured()
    sidestep(node, "explain", "alpha", "--inbound", node.pods["beta"].ip4, "--port", "9001", "--try")
    assert captured() == before + 1
    with tracing(node, "--dest", ":1"):  # when the counters have to tell
        sidestep(node, "explain", "alpha", "--inbound", node.pods["beta"].ip4, "--port", "9001", "--try")
    assert captured() == before + 2


@pytest.mark.parametrize(("uid", "status"), [(0, 0), (APP_ID, 1)])
def test_trying_needs_to_change_its_user_only_for_another_user(node: Node, uid: int, status: int) -> None:
    dropped = ("setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-setuid,-setgid")
    asked = ("explain", "--bpffs", node.bpffs, "alpha", f"{node.pods['beta'].ip4}:8080", "--uid", uid, "--gid", uid)
    done = invocation.sidestep(*asked, "--try", through=dropped)
    assert done.returncode == status, done.stderr
    if status == 0:
        assert "as explained" in done.stdout
    else:
        advice = "give the container SETUID and SETGID, or run this as root on the node itself"
        assert done.stderr.endswith(f"becoming uid {uid} gid {uid}: Operation not permitted; {advice}\n")


def test_a_program_that_is_attached_nowhere_captures_nothing() -> None:
    with Node() as node:
        alpha, beta = node.pod("alpha"), node.pod("beta")
        node.agent.kill()  # it would attach the program again
        (Pins(node.bpffs).links / "connect4").unlink()
        alpha.envoy.connections()
        assert alpha.curl(beta.ip4).pod == "beta"
        assert alpha.envoy.connections() == []  # which is why it has to be said

        words = "the program that decides is attached nowhere on this node; see `sidestep status`"
        found = walked(node, "alpha", "beta:8080", "--try", status=1)
        assert found["headline"] == f"WRONG: not captured: {words}"
        assert (wrong(found), found["try"]["agrees"]) == ([("client", f"not captured: {words}")], True)
        assert "stray" not in sidestep(node, "explain", "alpha", "beta:8080").stdout  # one fault, told once

        alone = document(node, "explain", "alpha", f"{beta.ip4}:8080", "--try")
        assert (alone["verdict"], alone["rule"], alone["why"]) == ("direct", "not attached", words)
        assert alone["try"]["agrees"]
        six = document(node, "explain", "alpha", f"[{beta.ip6}]:8080", "--try")
        assert (six["verdict"], six["rule"], six["try"]["agrees"]) == ("captured", "O10", True)


def test_a_link_local_destination_with_its_zone_is_as_explained(node: Node) -> None:
    found = document(node, "explain", "alpha", "[fe80::1%eth0]:80", "--try")
    assert (found["verdict"], found["try"]["agrees"], found["try"]["differs"]) == ("captured", True, "")
