"""`sidestep trace` beside real traffic: what it tells, whom it leaves out, and that nobody waits for it."""

import json
import signal
import subprocess
from typing import Any

import pytest

from bpf import syscalls
from bpf.layout import Tracing, Word
from bpf.pins import Descriptor, Pins
from tests.lab.command import sidestep, tracing
from tests.lab.node import Node
from tests.lab.pod import APP_PORT
from tests.node.conftest import Mesh


def events_of(process: "subprocess.Popen[str]", count: int) -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(process.stdout.readline()) for _ in range(count)]


def test_a_request_between_two_pods_is_four_events(mesh: Mesh) -> None:
    with tracing(mesh.node, "--output", "json") as trace:
        mesh.alpha.curl(mesh.beta.ip4)
        events = events_of(trace, 4)
    destination = f"{mesh.beta.ip4}:{APP_PORT}"
    assert all(each["destination"] == destination for each in events)
    told = {(each["pod"], each["event"], each["direction"], each["verdict"], each["rule"]) for each in events}
    assert told == {
        ("default/alpha", "connect", "outbound", "captured", "O10"),
        ("default/alpha", "connect", "outbound", "direct", "O3c"),
        ("default/beta", "inbound", "inbound", "captured", "I4"),
        ("default/beta", "connect", "outbound", "direct", "O2"),
    }
    app = next(each for each in events if each["rule"] == "O10")
    assert (app["process"], app["uid"], app["protocol"], app["listener"]) == ("curl", 1000, "tcp", 15001)


def test_one_pod_one_verdict_one_destination(mesh: Mesh) -> None:
    for filters in (
        ("default/alpha", "--verdict", "captured"),
        ("alpha", "--verdict", "captured", "--dest", f"{mesh.beta.ip4}/32"),
        ("beta", "--verdict", "captured", "--dest", f"{mesh.beta.ip4}:{APP_PORT}"),
    ):
        with tracing(mesh.node, *filters, "--output", "json") as trace:
            if "--dest" in filters:
                mesh.alpha.curl(mesh.gamma.ip4)
            mesh.alpha.curl(mesh.beta.ip4)
            (event,) = events_of(trace, 1)
            assert event["destination"] == f"{mesh.beta.ip4}:{APP_PORT}"
            assert event["verdict"] == "captured"


def test_a_proxy_that_is_killed_and_comes_back(node: Node) -> None:
    pod = node.pod("alpha")
    with tracing(node, "--output", "json") as trace:
        pod.envoy.stop()
        pod.envoy.start()
        assert trace.stdout is not None
        seen = []
        for line in trace.stdout:
            seen.append(json.loads(line))
            if sum(each["event"] == "listening" for each in seen) == 8:
                break
    kinds = [each["event"] for each in seen]
    assert kinds.count("closed") == kinds.count("listening") == 8
    (killed,) = [each for each in seen if each["event"] == "killed"]
    assert (killed["pod"], killed["signal"], killed["uid"]) == ("default/alpha", "SIGKILL", 1337)
    assert killed["sender"]


def test_people_get_a_line_an_event(mesh: Mesh) -> None:
    with tracing(mesh.node, "alpha", "--verdict", "captured") as trace:
        mesh.alpha.curl(mesh.beta.ip6)
        assert trace.stdout is not None
        line = trace.stdout.readline()
    assert f"→ [{mesh.beta.ip6}]:{APP_PORT} tcp: outbound captured, to 15001, O10\n" in line
    assert " default/alpha: curl (" in line


def test_interrupted_it_ends_and_leaves_nothing(mesh: Mesh) -> None:
    with tracing(mesh.node) as trace:
        trace.send_signal(signal.SIGINT)
        assert trace.wait(10) == 0
        assert trace.stderr is not None
        assert trace.stderr.read() == ""
    found = Tracing()
    with Descriptor(Pins(mesh.node.bpffs).open_map("tracing")) as table:
        syscalls.map_lookup(table.fd, Word(0), found)
    assert found.until == 0
    assert not list(Pins(mesh.node.bpffs).top.glob("trace-*"))


def test_one_trace_at_a_time(mesh: Mesh) -> None:
    with tracing(mesh.node):
        second = sidestep(mesh.node, "trace", "--seconds", "1")
    assert second.returncode == 1
    assert second.stderr == "sidestep: somebody else traces on this node; end that `sidestep trace` first\n"


@pytest.mark.parametrize("what", ["10.0.0.0/33", "example.com:80", "10.0.0.1:http"])
def test_a_destination_that_cannot_be_understood_is_one_line(mesh: Mesh, what: str) -> None:
    done = sidestep(mesh.node, "trace", "--dest", what)
    assert done.returncode == 1
    said = f'"{what}" is no destination; give 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80'
    assert done.stderr == f"sidestep: {said}\n"


CONNECTS = """
import errno, json, socket, sys, time
count, per_second = int(sys.argv[1]), int(sys.argv[2])
begun, denied = time.monotonic(), 0
for number in range(count):
    if number % 100 == 0:
        time.sleep(max(0.0, begun + number / per_second - time.monotonic()))
    s = socket.socket()
    s.setblocking(False)
    denied += s.connect_ex(("198.51.100.1", 7)) == errno.EPERM
    s.close()
print(json.dumps(denied))
"""


def test_ten_thousand_events_a_second_are_all_told(node: Node) -> None:
    pod = node.pod("alpha", annotations={"sidestep.io/deny-outbound-ports": "7"}, envoy=False)
    with tracing(node, "--verdict", "denied", "--output", "json") as trace:
        client = pod.popen(["python3", "-I", "-S", "-c", CONNECTS, "30000", "10000"], stdout=subprocess.PIPE, text=True)
        assert trace.stdout is not None
        lines = [trace.stdout.readline() for _ in range(30_000)]
        assert client.communicate(timeout=10)[0] == "30000\n"
        trace.send_signal(signal.SIGINT)
        assert trace.communicate(timeout=10) == ("", "")
    assert {json.loads(line)["verdict"] for line in lines} == {"denied"}
