"""`sidestep explain`: what it says of connections of real pods, and that trying them comes out the same."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import syscalls
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from tests.lab import invocation
from tests.lab.command import tracing
from tests.lab.envoy import PROXY_ID
from tests.lab.inside import PYTHON
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.sidestep import document, sidestep

TRAFFIC = "traffic.sidecar.istio.io/"
ANNOTATIONS = {
    f"{TRAFFIC}excludeOutboundPorts": "15020,22",
    f"{TRAFFIC}excludeOutboundIPRanges": "192.0.2.0/24,198.51.100.0/24",
    f"{TRAFFIC}excludeInboundPorts": "9000",
    "sidestep.io/deny-outbound-ports": "25",
    "sidestep.io/deny-inbound-ports": "23",
}
DNS = {"ISTIO_DUAL_STACK": "true", "ISTIO_META_DNS_CAPTURE": "true"}
OUTBOUND, INBOUND = "the proxy's outbound listener", "the proxy's inbound listener"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod("alpha", annotations=ANNOTATIONS, proxy_env=DNS)
        made.pod("beta")
        yield made


@pytest.fixture(scope="module")
def alpha(node: Node) -> Pod:
    return node.pods["alpha"]


@pytest.fixture(scope="module")
def beta(node: Node) -> Pod:
    return node.pods["beta"]


def named(node: Node, text: str) -> str:
    """With the pods' addresses put in."""
    alpha, beta = node.pods["alpha"], node.pods["beta"]
    return text.format(own4=alpha.ip4, own6=alpha.ip6, b4=beta.ip4, b6=beta.ip6)


@pytest.mark.parametrize(
    ("question", "verdict", "rule", "annotation", "goes_to"),
    [
        ("{b4}:8080", "captured", "O10", ("includeOutboundIPRanges", "*", ""), OUTBOUND),
        ("[{b6}]:8080", "captured", "O10", ("includeOutboundIPRanges", "*", ""), OUTBOUND),
        ("[::ffff:{b4}]:8080", "captured", "O10", ("includeOutboundIPRanges", "*", ""), OUTBOUND),
        ("{b4}:8080 --uid 1000 --gid 1000", "captured", "O10", ("includeOutboundIPRanges", "*", ""), OUTBOUND),
        ("{b4}:8080 --as-proxy", "direct", "O3c", None, "{b4}:8080"),
        ("{b4}:8080 --uid 0 --gid 1337", "direct", "O4c", None, "{b4}:8080"),
        ("{b4}:22", "direct", "O1", ("excludeOutboundPorts", "22,15020", "22"), "{b4}:22"),
        (
            "192.0.2.9:80",
            "direct",
            "O8",
            ("excludeOutboundIPRanges", "192.0.2.0/24,198.51.100.0/24", "192.0.2.0/24"),
            "192.0.2.9:80",
        ),
        ("127.0.0.1:8080", "direct", "O3b", None, "127.0.0.1:8080"),
        ("0.0.0.0:8080", "direct", "O3b", None, "127.0.0.1:8080"),
        ("{own4}:8080 --as-proxy", "captured", "O3a", None, INBOUND),
        ("[{own6}]:8080 --as-proxy", "captured", "O3a", None, INBOUND),
        ("{own4}:8080 --as-proxy --source 127.0.0.6", "direct", "O2", None, "{own4}:8080"),
        ("{b4}:8080 --source {own4}", "captured", "O10", ("includeOutboundIPRanges", "*", ""), OUTBOUND),
        ("{b4}:53", "captured", "O6", ("ISTIO_META_DNS_CAPTURE", "true", ""), "pilot-agent's resolver"),
        ("{b4}:53 --udp", "captured", "O6", ("ISTIO_META_DNS_CAPTURE", "true", ""), "pilot-agent's resolver"),
        ("{b4}:53/udp", "captured", "O6", ("ISTIO_META_DNS_CAPTURE", "true", ""), "pilot-agent's resolver"),
        ("{b4}:80 --udp", "direct", "UDP", None, "{b4}:80"),
        ("[{b6}]:80/udp", "direct", "UDP", None, "[{b6}]:80"),
        ("{b4}:53/tcp", "captured", "O6", ("ISTIO_META_DNS_CAPTURE", "true", ""), "pilot-agent's resolver"),
        ("{b4}:25", "denied", "deny", ("sidestep.io/deny-outbound-ports", "25", "25"), None),
        ("{b4}:25 --as-proxy", "denied", "deny", ("sidestep.io/deny-outbound-ports", "25", "25"), None),
        ("--inbound {b4} --port 8080", "captured", "I4", ("includeInboundPorts", "*", ""), INBOUND),
        ("--inbound {b6} --port 8080", "captured", "I4", ("includeInboundPorts", "*", ""), INBOUND),
        ("--inbound {b4} --port 9000", "direct", "I4", ("excludeInboundPorts", "9000", "9000"), "its own port"),
        ("--inbound {b4} --port 15008", "direct", "I3", None, "its own port"),
        ("--inbound {b4} --port 15090", "direct", "I4", None, "its own port"),
        ("--inbound {b4} --port 23", "denied", "deny", ("sidestep.io/deny-inbound-ports", "23", "23"), None),
    ],
)
def test_what_is_explained_is_what_happens(
    node: Node, question: str, verdict: str, rule: str, annotation: tuple[str, str, str] | None, goes_to: str | None
) -> None:
    found = document(node, "explain", "alpha", *named(node, question).split(), "--try")
    assert (found["pod"], found["verdict"], found["rule"]) == ("default/alpha", verdict, rule)
    cause = found["annotation"]
    assert (cause and (cause["name"].removeprefix(TRAFFIC), cause["value"], cause["part"])) == annotation
    assert (found["goes_to"] and found["goes_to"]["what"]) == (goes_to and named(node, goes_to))
    assert found["try"]["agrees"], found["try"]


# Connects as the proxy, so that nothing is captured on the way, as often as it can.
FLOOD = """
import socket, sys
print("ready", flush=True)
while True:
    with socket.socket() as s:
        s.connect_ex((sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture
def busy(alpha: Pod, beta: Pod) -> Iterator[None]:
    """Connections to an uncaptured port of alpha, one after the other."""
    argv = [*PYTHON, FLOOD, str(alpha.ip4), "9000"]
    with beta.popen(argv, uid=PROXY_ID, stdout=subprocess.PIPE, text=True) as flood:
        assert flood.stdout.readline() == "ready\n"
        yield
        flood.kill()


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(
    ("port", "happened"), [(8080, f"to {INBOUND}"), (9000, "directly"), (23, "nowhere: it was refused")]
)
def test_what_others_do_meanwhile_is_not_taken_for_ours(node: Node, beta: Pod, port: int, happened: str) -> None:
    found = document(node, "explain", "alpha", "--inbound", beta.ip4, "--port", port, "--try")["try"]
    assert found["agrees"], found
    assert found["happened"].partition("; ")[2] == happened


@pytest.mark.usefixtures("busy")
def test_a_pod_that_is_too_busy_is_told_while_somebody_else_traces(node: Node, beta: Pod) -> None:
    with tracing(node, "--dest", ":1"):
        done = sidestep(node, "explain", "alpha", "--inbound", beta.ip4, "--port", 8080, "--try")
    if done.returncode == 0:  # a quiet moment
        assert f"; to {INBOUND}\n" in done.stdout
    else:
        assert "default/alpha has too many connections at the moment to tell which one was ours" in done.stderr


def test_settings_of_the_agent_that_it_does_not_need_are_not_looked_at(node: Node, beta: Pod) -> None:
    gone = {"CNI_AGENT_RUN_DIR": "/gone"}
    for argv, stale in ((("explain", "alpha", f"{beta.ip4}:80"), gone), (("deny",), gone | {"SIDESTEP_PODS": "/gone"})):
        done = invocation.sidestep(argv[0], "--bpffs", node.bpffs, *argv[1:], environment=stale)
        assert (done.returncode, done.stderr) == (0, "")


def test_it_is_told_in_a_few_lines(node: Node, beta: Pod) -> None:
    done = sidestep(node, "explain", "default/alpha", f"{beta.ip4}:22", "--try")
    assert done.stdout == (
        f"default/alpha, uid 0 gid 0 → {beta.ip4}:22 (TCP)\n"
        "  direct, rule O1: its port is an excluded outbound port\n"
        '  annotation  traffic.sidecar.istio.io/excludeOutboundPorts: "22,15020", matching element 22\n'
        f"  goes to     {beta.ip4}:22\n"
        f"  tried       connected, the kernel dialled {beta.ip4}:22; directly\n"
        "              as explained\n"
    )


def test_without_a_port_all_inbound_ones_are_explained(node: Node, beta: Pod) -> None:
    found = document(node, "explain", "alpha", "--inbound", beta.ip4)
    assert (found["verdict"], found["rule"], found["connection"]["port"]) == ("captured", "I4", None)
    others = {each["port"]: (each["verdict"], each["rule"]) for each in found["other_ports"]}
    assert others == {
        23: ("denied", "deny"),
        9000: ("direct", "I4"),
        15008: ("direct", "I3"),
        **dict.fromkeys((15020, 15021, 15090), ("direct", "I4")),
    }


def test_a_listener_that_is_missing_is_told(node: Node, beta: Pod) -> None:
    bare = node.pod("bare", envoy=False, app=False)
    process = bare.popen(["sleep", "60"])
    try:
        found = document(node, "explain", "bare", f"{beta.ip4}:8080", "--try")
        assert (found["goes_to"]["is_listening"], found["try"]["error"]) == (False, "ECONNREFUSED")
        found = document(node, "explain", "bare", "--inbound", beta.ip4, "--port", 8080, "--try")
        assert (found["goes_to"]["is_listening"], found["try"]["error"]) == (False, "ECONNREFUSED")
    finally:
        process.kill()
        process.wait()
        bare.stop()


def test_early_outbound_and_an_unknown_strict_proxy(node: Node, beta: Pod) -> None:
    annotations = {"sidestep.io/early-outbound": "allow", "sidestep.io/strict-proxy": "true"}
    early = node.pod("early", annotations=annotations, envoy=False)
    try:
        found = document(node, "explain", "early", f"{beta.ip4}:8080", "--try")
        assert (found["verdict"], found["rule"], found["try"]["agrees"]) == ("direct", "early-outbound", True)
        found = document(node, "explain", "early", f"{beta.ip4}:8080", "--as-proxy", "--try")
        assert (found["verdict"], found["rule"], found["goes_to"]) == ("refused", "O3c", None)
        assert (found["try"]["agrees"], found["try"]["error"]) == (True, "EPERM")
    finally:
        early.stop()


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("unreachable", "EHOSTUNREACH", "a route of the pod says unreachable"),
        ("prohibit", "EACCES", "a route of the pod prohibits it"),
        ("blackhole", "EINVAL", "blackhole"),
    ],
)
def test_where_a_route_leads_nowhere(node: Node, kind: str, error: str, words: str) -> None:
    name = f"routed-{kind}"
    pod = node.pod(name, envoy=False)
    try:
        subprocess.run(["ip", "-n", pod.netns.name, "route", "add", kind, "203.0.113.0/24"], check=True)
        wait_until(lambda: document(node, "explain", name, "203.0.113.9:80")["rule"] == "no-route", "the route", 4)
        found = document(node, "explain", name, "203.0.113.9:80", "--try")
        assert (found["verdict"], found["error"], found["goes_to"]) == ("unreachable", error, None)
        assert words in found["why"]
        assert (found["try"]["agrees"], found["try"]["error"]) == (True, error)
        assert (
            f"goes to     nobody: the call fails with {error}"
            in sidestep(node, "explain", name, "203.0.113.9:80").stdout
        )
        found = document(node, "explain", name, "203.0.113.9:80", "--as-proxy", "--try")
        assert (found["verdict"], found["rule"]) == ("direct", "O3c")
        assert document(node, "explain", name, "198.51.100.9:80")["verdict"] == "captured"
        found = document(node, "explain", name, "198.51.100.9:80", "--source", "127.0.0.1", "--try")
        assert (found["verdict"], found["error"], found["try"]["agrees"]) == ("unreachable", "EINVAL", True)
    finally:
        pod.stop()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("10.0.0.1:80", "--interface", "eth9"), "default/alpha has no interface eth9; its interfaces: "),
        (("--inbound", "203.0.113.1", "--port", "80", "--try"), "nobody here can connect from it"),
    ],
)
def test_what_is_not_there_is_one_clear_line(node: Node, argv: tuple[str, ...], message: str) -> None:
    done = sidestep(node, "explain", "alpha", *argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr.splitlines()[-1]


def let_all_pass(pinned: Path) -> None:
    """Put a program into the link that lets every connection pass: the link is still there, and captures nothing."""
    code = bytes((0xB7, 0, 0, 0, 1, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0))  # r0 = 1; exit (linux/bpf.h)
    kind, connect4 = 18, 10  # BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT
    with (
        Descriptor(syscalls.open_pin(pinned)) as link,
        Descriptor(syscalls.load_program("passes", kind, connect4, code, ())) as program,
    ):
        syscalls.update_link(link.fd, program.fd, pinned)


def test_what_differs_is_told_by_the_exit_status() -> None:
    with Node() as node:
        alpha, beta = node.pod("alpha"), node.pod("beta")
        node.agent.terminate()
        question = ("explain", "alpha", f"{beta.ip4}:8080", "--try")
        assert document(node, *question)["try"]["agrees"]
        let_all_pass(Pins(node.bpffs).links / "connect4")
        found = document(node, *question, status=1)
        assert found["verdict"] == "captured"
        assert found["try"]["differs"] == "it went directly"
        assert alpha.curl(beta.ip4).pod == "beta"
        assert "NOT as explained: it went directly" in sidestep(node, *question).stdout
        walk = document(node, "explain", "alpha", "beta:8080", "--try", status=1)
        assert (walk["state"], walk["headline"]) == ("wrong", "WRONG: NOT as explained: it went directly")
