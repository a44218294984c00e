"""`sidestep trace` beside real traffic: what it tells, and whom it leaves out."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from bpf import syscalls
from bpf.layout import TracingEntry, Word
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from tests.lab.command import sidestep, tracing
from tests.lab.inside import PYTHON
from tests.lab.node import REPOSITORY, Node
from tests.lab.pod import APP_PORT, APP_TCP_PORT, Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

LIMIT = 60


def events_of(process: "subprocess.Popen[str]", count: int) -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(process.stdout.readline()) for _ in range(count)]


@pytest.mark.claim("verdicts and signals, never contents")
def test_a_request_between_two_pods_is_four_events(mesh: Mesh) -> None:
    with tracing(mesh.node, "--output", "json") as trace:
        mesh.alpha.curl(mesh.beta.ip4, options=("--header", "X-Secret: unheard-of"))
        events = events_of(trace, 4)
    assert "unheard-of" not in json.dumps(events)
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


@pytest.mark.claim("A trace of one pod has only that pod's")
def test_one_pod_one_verdict_one_destination(mesh: Mesh) -> None:
    for filters in (
        ("default/alpha", "--verdict", "captured"),
        ("alpha", "--verdict", "captured", "--dest", f"{mesh.beta.ip4}/32"),
        ("beta", "--verdict", "captured", "--dest", f"{mesh.beta.ip4}:{APP_TCP_PORT}"),
    ):
        with tracing(mesh.node, *filters, "--output", "json") as trace:
            if "--dest" in filters:
                mesh.alpha.curl(mesh.gamma.ip4)
            mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT)
            (event,) = events_of(trace, 1)
            assert event["destination"] == f"{mesh.beta.ip4}:{APP_TCP_PORT}"
            assert event["verdict"] == "captured"


def until(trace: "subprocess.Popen[str]", **fields: object) -> list[dict[str, Any]]:
    """Events up to the first that has these fields."""
    assert trace.stdout is not None
    events = []
    for line in trace.stdout:
        events.append(json.loads(line))
        if fields.items() <= events[-1].items():
            break
    return events


SEND = """
import errno, json, socket, sys
family, address, port = sys.argv[1:]
with socket.socket(getattr(socket, family), socket.SOCK_DGRAM) as s:
    try:
        s.sendto(b"x", (address, int(port)))
        print("0")
    except OSError as error:
        print(json.dumps(errno.errorcode[error.errno]))
"""


@contextmanager
def extra(mesh: Mesh, name: str, annotations: dict[str, str] | None = None, **env: str) -> Iterator[Pod]:
    """Another pod of the mesh, without a proxy."""
    pod = mesh.node.pod(
        name, annotations=annotations, proxy_env={"ISTIO_DUAL_STACK": "true", **env}, app=False, envoy=False
    )
    try:
        yield pod
    finally:
        pod.stop()


def test_dns_that_goes_to_the_resolver_is_told_with_whom_was_asked(mesh: Mesh) -> None:
    with (
        extra(mesh, "dns", ISTIO_META_DNS_CAPTURE="true") as pod,
        tracing(mesh.node, "dns", "--output", "json") as trace,
    ):
        for family, address in (("AF_INET", "192.0.2.53"), ("AF_INET6", "2001:db8::53")):
            pod.python(SEND, family, address, 53)
        four, six = events_of(trace, 2)
    for event, destination in ((four, "192.0.2.53:53"), (six, "[2001:db8::53]:53")):
        assert (event["event"], event["destination"], event["protocol"]) == ("connect", destination, "udp")
        assert (event["direction"], event["verdict"], event["listener"]) == ("dns", "captured", 15053)
        assert (event["rule"], event["uid"]) == ("O6", 1000)


def test_a_connection_without_a_listener_is_refused_and_the_listeners_come_and_go(mesh: Mesh) -> None:
    with extra(mesh, "quiet") as pod, tracing(mesh.node, "quiet", "--verdict", "refused", "--output", "json") as trace:
        assert mesh.gamma.curl(pod.ip4).pod is None
        (refused,) = events_of(trace, 1)
        pod.envoy.start()
        begun = [events_of(trace, 8)]
        pod.envoy.stop()
        begun.append(events_of(trace, 8))
    assert (refused["event"], refused["pod"], refused["protocol"]) == ("inbound", "default/quiet", "tcp")
    assert (refused["direction"], refused["verdict"], refused["rule"]) == ("inbound", "refused", "I4")
    assert refused["destination"] == f"{pod.ip4}:{APP_PORT}"
    assert refused["source"].rpartition(":")[0] == str(mesh.gamma.ip4)
    listeners = {f"{ip}:{port}" for ip in ("0.0.0.0", "[::]") for port in (15001, 15006)}
    for events, kind in zip(begun, ("listening", "closed"), strict=True):
        assert {each["event"] for each in events} == {kind}
        assert {each["destination"] for each in events} == listeners


def test_what_has_no_route_is_told(mesh: Mesh) -> None:
    with (
        extra(mesh, "lost", ISTIO_META_DNS_CAPTURE="true") as pod,
        tracing(mesh.node, "lost", "--verdict", "unreachable", "--output", "json") as trace,
    ):
        for version in (4, 6):
            subprocess.run(["ip", f"-{version}", "-n", pod.netns.name, "route", "del", "default"], check=True)
        wait_until(lambda: pod.python(SEND, "AF_INET6", "2001:db8::53", 53) == "ENETUNREACH", "the change", 4)
        events_of(trace, 1)
        assert pod.python(SEND, "AF_INET", "192.0.2.53", 53) == "ENETUNREACH"
        assert pod.curl("192.0.2.9").pod is None
        query, connection = events_of(trace, 2)
    for event, destination in ((query, "192.0.2.53:53"), (connection, f"192.0.2.9:{APP_PORT}")):
        assert (event["direction"], event["verdict"], event["rule"]) == ("outbound", "unreachable", "no-route")
        assert (event["destination"], event["listener"]) == (destination, None)


def test_a_datagram_to_a_denied_port_is_told(mesh: Mesh) -> None:
    deny = {"sidestep.io/deny-outbound-ports": "9"}
    with extra(mesh, "sender", deny) as pod, tracing(mesh.node, "sender", "--output", "json") as trace:
        for family, address in (("AF_INET", "192.0.2.1"), ("AF_INET6", "2001:db8::1")):
            assert pod.python(SEND, family, address, 9) == "EPERM"
        four, six = events_of(trace, 2)
    for event, destination in ((four, "192.0.2.1:9"), (six, "[2001:db8::1]:9")):
        assert (event["event"], event["destination"], event["protocol"]) == ("connect", destination, "udp")
        assert (event["direction"], event["verdict"], event["rule"]) == ("outbound", "denied", "deny")
        assert event["uid"] == 1000


def test_what_arrives_at_a_denied_port_is_told(mesh: Mesh) -> None:
    deny = {"sidestep.io/deny-inbound-ports": str(APP_PORT)}
    with (
        extra(mesh, "denier", deny) as pod,
        tracing(mesh.node, "denier", "--verdict", "denied", "--output", "json") as trace,
    ):
        assert mesh.gamma.curl(pod.ip4).pod is None
        assert mesh.gamma.python(SEND, "AF_INET6", pod.ip6, APP_PORT) == 0
        tcp, udp = events_of(trace, 2)
    for event, protocol, destination, source in (
        (tcp, "tcp", f"{pod.ip4}:{APP_PORT}", str(mesh.gamma.ip4)),
        (udp, "udp", f"[{pod.ip6}]:{APP_PORT}", f"[{mesh.gamma.ip6}]"),
    ):
        assert (event["event"], event["protocol"], event["destination"]) == ("inbound", protocol, destination)
        assert (event["direction"], event["verdict"], event["rule"]) == ("inbound", "denied", "deny")
        assert event["source"].rpartition(":")[0] == source


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
    assert killed["sender"] == os.getpid()


VICTIM = """
import resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGCHLD, lambda *_: None)
print("ready", flush=True)
while True:
    signal.pause()
"""

# Two processes send a signal each, on the victim's processor and before it: it gets both before it can do anything.
KILLERS = """
import os, sys
victim, first, second = map(int, sys.argv[1:])
processor = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(victim, processor)
os.sched_setaffinity(0, processor)
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
ready, go = os.pipe(), os.pipe()
other = os.fork()
if not other:
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os.kill(victim, second)
    os._exit(0)
os.read(ready[0], 1)
os.kill(victim, first)
os.write(go[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGKILL, signal.SIGKILL),
        (signal.SIGKILL, signal.SIGCHLD),
        (signal.SIGABRT, signal.SIGCHLD),
        (signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_the_sender_is_who_has_killed_and_not_who_came_later(mesh: Mesh, first: int, second: int) -> None:
    with tracing(mesh.node, "alpha", "--output", "json") as trace:
        victim = mesh.alpha.popen([*PYTHON, VICTIM], stdout=subprocess.PIPE)
        assert victim.stdout.readline() == b"ready\n"
        killers = subprocess.Popen([*PYTHON, KILLERS, *map(str, (victim.pid, int(first), int(second)))])
        assert killers.wait(LIMIT) == 0
        assert victim.wait(LIMIT) == -first
        killed = until(trace, event="killed", pid=victim.pid)[-1]
    victim.stdout.close()
    assert (killed["signal"], killed["sender"]) == (signal.Signals(first).name, killers.pid)


def test_people_get_a_line_an_event(mesh: Mesh) -> None:
    with tracing(mesh.node, "alpha", "--verdict", "captured") as trace:
        mesh.alpha.curl(mesh.beta.ip6)
        assert trace.stdout is not None
        line = trace.stdout.readline()
    to, why = f"default/beta ([{mesh.beta.ip6}]:{APP_PORT})", "O10: its address is in an included range"
    assert f"→ {to} tcp: outbound captured, to 15001 ({why})\n" in line
    assert " default/alpha: curl (" in line


def test_yaml_is_a_document_an_event(mesh: Mesh) -> None:
    with tracing(mesh.node, "alpha", "--verdict", "captured", "--output", "yaml") as trace:
        for _ in range(2):
            mesh.alpha.curl(mesh.beta.ip4)
        trace.send_signal(signal.SIGINT)
        output, said = trace.communicate(timeout=LIMIT)
    assert (trace.returncode, said) == (0, "traced: 2 events, 0 lost\n")
    events = list(yaml.safe_load_all(output))
    assert [(each["pod"], each["rule"], each["listener"]) for each in events] == [("default/alpha", "O10", 15001)] * 2


def test_pods_and_proxies_are_called_by_their_names(mesh: Mesh) -> None:
    with tracing(mesh.node, "--output", "jsonl") as trace:
        mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT)
        events = events_of(trace, 4)
    app, proxy, inbound, own = sorted(events, key=lambda each: each["time"])
    assert {each["destination_pod"] for each in events} == {"default/beta"}
    assert inbound["source_pod"] == "default/alpha"
    assert [each["is_proxy"] for each in (app, proxy, own)] == [False, True, True]
    assert (proxy["rule"], proxy["why"], proxy["outcome"]) == ("O3c", "the proxy's user opened it", None)


def test_what_became_of_a_connection_is_told_where_it_is_known(mesh: Mesh) -> None:
    with extra(mesh, "deaf") as pod, tracing(mesh.node, "deaf") as trace:
        mesh.gamma.curl(pod.ip4)
        assert trace.stdout is not None
        line = trace.stdout.readline()
    assert f"{mesh.gamma.ip4}:" in line  # which is no pod of the mesh
    assert "tcp: inbound refused: nobody listens on 15006 (I4: all inbound ports except the excluded" in line


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        (("--direction", "inbound"), "I4"),
        (("--rule", "o3c"), "O3c"),
        (("--rule", "O3c", "--not"), "O10 I4 O2"),
        (("--verdict", "captured", "--not"), "O3c O2"),
        (("--port", APP_TCP_PORT), "O10 O3c I4 O2"),
        (("--port", APP_TCP_PORT, "--not"), ""),
    ],
    ids=str,
)
def test_filters_choose_by_direction_rule_verdict_and_port(mesh: Mesh, filters: tuple[str, ...], told: str) -> None:
    with tracing(mesh.node, *filters, "--output", "json") as trace:
        mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT)
        trace.send_signal(signal.SIGINT)
        output, said = trace.communicate(timeout=LIMIT)
    assert {json.loads(line)["rule"] for line in output.splitlines()} == set(told.split())
    assert said == f"traced: {len(output.splitlines())} event{'s'[: len(told.split()) != 1]}, 0 lost\n"


@pytest.mark.parametrize("gone", ["stdout", "stdin"])
def test_it_ends_when_its_reader_has_gone_though_nothing_happens(mesh: Mesh, gone: str) -> None:
    argv = [sys.executable, "-m", "installer", "trace", "--bpffs", str(mesh.node.bpffs), "--follow"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as trace:
        try:
            assert trace.stderr is not None
            assert trace.stderr.readline() == "tracing\n"
            getattr(trace, gone).close()
            assert trace.wait(LIMIT) == 0
            assert trace.stderr.read() == "traced: 0 events, 0 lost\n"
        finally:
            trace.kill()


@pytest.mark.claim("While nobody reads, nothing is recorded by it")
def test_interrupted_it_ends_and_leaves_nothing(mesh: Mesh) -> None:
    with tracing(mesh.node) as trace:
        trace.send_signal(signal.SIGINT)
        assert trace.wait(10) == 0
        assert trace.stderr is not None
        assert trace.stderr.read() == "traced: 0 events, 0 lost\n"
    found = TracingEntry()
    with Descriptor(Pins(mesh.node.bpffs).open_map("tracing")) as table:
        syscalls.map_lookup(table.fd, Word(0), found)
    assert found.until == 0
    assert not list(Pins(mesh.node.bpffs).top.glob("trace-*"))


@pytest.mark.claim("one reader at a time")
def test_one_trace_at_a_time(mesh: Mesh) -> None:
    with tracing(mesh.node, "alpha") as first:
        second = sidestep(mesh.node, "trace", "--seconds", "1")
        command = f"sidestep trace --bpffs {mesh.node.bpffs} alpha --follow"
    assert second.returncode == 1
    assert second.stderr == (
        f"sidestep: process {first.pid} ({command}) reads this node's events, and there can be one reader at a time; "
        "end it first\n"
    )


def test_a_pod_that_nobody_knows_is_one_line(mesh: Mesh) -> None:
    done = sidestep(mesh.node, "trace", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sidestep: no enrolled pod is called nobody; enrolled pods: default/alpha, default/beta\n"


@pytest.mark.claim("and up to three remote ends")
def test_what_was_refused_before_is_told_by_the_agent(mesh: Mesh) -> None:
    run_dir = ("--cni-agent-run-dir", mesh.node.run_dir)

    def last(*argv: object) -> list[dict[str, Any]]:
        done = sidestep(mesh.node, "trace", "--last", 5, *run_dir, *argv, "--output", "jsonl")
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line) for line in done.stdout.splitlines()]

    deny = {"sidestep.io/deny-outbound-ports": "9"}
    with extra(mesh, "mute", deny) as pod:
        for _ in range(2):
            assert mesh.gamma.curl(pod.ip4).pod is None
        assert pod.python(SEND, "AF_INET", "192.0.2.1", 9) == "EPERM"
        wait_until(lambda: sum(each["count"] for each in last("mute")) == 3, "the agent to look", LIMIT)
        kinds = {(each["pod"], each["direction"], each["verdict"]) for each in last("default/mute")}
        assert kinds == {("default/mute", "inbound", "refused"), ("default/mute", "outbound", "denied")}
        assert {each["verdict"] for each in last("mute", "--verdict", "denied")} == {"denied"}
        assert all(each.keys() == {"at", "pod", "direction", "verdict", "count", "peers"} for each in last("mute"))
        assert {peer for each in last("mute") for peer in each["peers"]} == {
            "192.0.2.1:9",
            f"from {mesh.gamma.ip4} to port {APP_PORT}",
        }
        assert last("alpha") == []
        text = sidestep(mesh.node, "trace", "mute", "--last", 5, "--direction", "inbound", *run_dir).stdout
        assert re.search(
            r"Z default/mute: inbound refused (2 times|once) \(from .*\): nobody listens on 15006\n", text
        ), text
    nothing = sidestep(mesh.node, "trace", "alpha", "--last", 1, *run_dir)
    words, _, others = nothing.stdout.partition("; others were, in ")
    assert words == "nothing of that kind was refused or denied, as far as the agent looked"
    assert "default/mute" in others.strip().split(", ")
    away = sidestep(mesh.node, "trace", "--last", 1, "--cni-agent-run-dir", "/never")
    assert away.returncode == 1
    assert "only a running agent knows what was refused before: /never/cni.sock: nobody is there" in away.stderr


def test_a_locale_without_arrows_ends_no_trace(monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with tracing(mesh.node, "--direction", "outbound", "--verdict", "captured") as trace:
        mesh.alpha.curl(mesh.beta.ip4)
        assert trace.stdout is not None
        assert f" → default/beta ({mesh.beta.ip4}:{APP_PORT}) " in trace.stdout.readline()


def test_processes_that_cannot_be_looked_at_are_not_said_to_be_untraced() -> None:
    with Node() as node:
        node.pod("alpha", envoy=False, app=False)
        node.agent.kill()  # it would attach the program again
        (Pins(node.bpffs).links / "connect6").unlink()
        told = sidestep(node, "trace", "alpha", "--seconds", "0.1").stderr
    assert "connect6 not attached; if there are some, they are not traced" in told
