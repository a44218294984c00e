"""Denied ports as an operator meets them: annotations that change, connections that are closed, what is shown."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab.apiserver import ApiServer
from tests.lab.command import sidestep, sidestep_json
from tests.lab.node import Node
from tests.lab.pod import APP_TCP_PORT, Pod
from tests.lab.waiting import wait_until

OUTBOUND, INBOUND = "sidestep.io/deny-outbound-ports", "sidestep.io/deny-inbound-ports"
# Keeps one connection to the other application open and says what becomes of it.
HELD = """
import socket, sys
own = ("", int(sys.argv[3])) if len(sys.argv) > 3 else None
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), source_address=own)
s.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
s.recv(1 << 16)
print("ready", flush=True)
try:
    print("data" if s.recv(1) else "end", flush=True)
except (ConnectionResetError, ConnectionAbortedError):
    print("reset", flush=True)
"""


# Connects again and again until that is not permitted.
CONNECTING = """
import errno, socket, sys, time
told, number = False, 0
while number != errno.EPERM:
    with socket.socket() as s:
        s.settimeout(5)
        number = s.connect_ex((sys.argv[1], int(sys.argv[2])))
    if number == 0 and not told:
        print("connected", flush=True)
        told = True
    time.sleep(0.005)
print("refused", flush=True)
"""
EPHEMERAL, DATABASE = 40000, 5432


@pytest.fixture
def pods(node: Node) -> Iterator[tuple[Pod, Pod]]:
    alpha, beta = node.pod("alpha"), node.pod("beta")
    yield alpha, beta
    for pod in (alpha, beta):
        pod.stop()


def annotate(pod: Pod, **annotations: str) -> None:
    """As `kubectl annotate` does."""
    pod.annotations.update({OUTBOUND if key == "outbound" else INBOUND: value for key, value in annotations.items()})
    if pod.node.api:
        pod.publish(phase="Running", podIP=str(pod.ip4))
    else:
        (pod.node.pods_dir / f"{pod.name}.yaml").write_text(yaml.safe_dump(pod.manifest()))


def hold(client: Pod, server: Pod, own_port: int | None = None) -> Any:
    """A process of the client that holds a connection."""
    more = () if own_port is None else (str(own_port),)
    argv = ["python3", "-I", "-S", "-c", HELD, str(server.ip4), str(APP_TCP_PORT), *more]
    held = client.popen(argv, uid=0, stdout=-1, text=True)
    assert held.stdout.readline() == "ready\n"
    return held


def test_an_annotation_that_changes_counts_for_a_running_pod(node: Node, pods: tuple[Pod, Pod]) -> None:
    alpha, beta = pods
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod == "beta"
    annotate(alpha, outbound=str(APP_TCP_PORT))
    wait_until(lambda: alpha.curl(beta.ip4, APP_TCP_PORT).pod is None, "the port to be denied", 5)
    (denier,) = sidestep_json(node, "deny")
    assert (denier["pod"], denier["outbound"], denier["inbound"]) == ("default/alpha", [APP_TCP_PORT], [])
    assert denier["refused"]["outbound"] > 0
    annotate(alpha, outbound="")
    wait_until(lambda: alpha.curl(beta.ip4, APP_TCP_PORT).pod == "beta", "the port to be allowed again", 5)
    assert sidestep(node, "deny").stdout == "no pod denies ports\n"
    assert sidestep(node, "deny", "alpha").stdout == "alpha denies no ports\n"


def test_a_denied_inbound_port_refuses_others_and_not_the_pod_itself(pods: tuple[Pod, Pod]) -> None:
    alpha, beta = pods
    annotate(beta, inbound=str(APP_TCP_PORT))
    wait_until(lambda: alpha.curl(beta.ip4, APP_TCP_PORT).pod is None, "the port to be denied", 5)
    assert alpha.curl(beta.ip6, APP_TCP_PORT).pod is None
    assert beta.curl("127.0.0.1", APP_TCP_PORT).pod == "beta"


@pytest.mark.claim("For a changed deny annotation of a running pod, the old value stays")
def test_a_value_that_makes_no_sense_changes_nothing(node: Node, pods: tuple[Pod, Pod]) -> None:
    alpha, _ = pods
    annotate(alpha, outbound="9999")
    wait_until(lambda: bool(sidestep_json(node, "deny")), "the port to be denied", 5)
    annotate(alpha, outbound="many")
    wait_until(lambda: "pod.denial_refused" in node.agent.log.read_text(), "the refusal", 5)
    assert 'deny-outbound-ports: \\"many\\" is not a port' in node.agent.log.read_text()
    assert [each["outbound"] for each in sidestep_json(node, "deny")] == [[9999]]


@pytest.mark.parametrize(("who", "direction"), [("alpha", "outbound"), ("beta", "inbound")])
def test_kill_resets_what_is_older_than_the_denial(node: Node, pods: tuple[Pod, Pod], who: str, direction: str) -> None:
    alpha, beta = pods
    held = hold(alpha, beta)
    annotate(node.pods[who], **{direction: str(APP_TCP_PORT)})
    wait_until(lambda: alpha.curl(beta.ip4, APP_TCP_PORT).pod is None, "the port to be denied", 5)
    assert held.poll() is None
    (denier,) = sidestep_json(node, "deny", who, "--kill")
    assert denier["killed"], denier
    assert denier["problem"] == ""
    assert held.communicate(timeout=30)[0] == "reset\n"
    assert sidestep_json(node, "deny", who, "--kill")[0]["killed"] == []


def test_kill_leaves_alone_what_has_a_denied_port_at_its_clients_end(node: Node, pods: tuple[Pod, Pod]) -> None:
    alpha, beta = pods
    gamma = node.pod("gamma", mesh=False)
    outgoing, incoming = hold(alpha, beta, own_port=EPHEMERAL), hold(gamma, beta, own_port=DATABASE)
    annotate(alpha, inbound=str(EPHEMERAL))
    annotate(beta, outbound=str(DATABASE))
    wait_until(lambda: len(sidestep_json(node, "deny")) == 2, "the ports to be denied", 30)
    killed = {each["pod"]: (each["killed"], each["problem"]) for each in sidestep_json(node, "deny", "--kill")}
    assert killed == {"default/alpha": ([], ""), "default/beta": ([], "")}
    for held in (outgoing, incoming):
        assert held.poll() is None
        held.kill()
        held.communicate()
    gamma.stop()


def test_a_namespace_that_is_not_found_is_told_and_the_other_pods_get_theirs(
    node: Node, pods: tuple[Pod, Pod], tmp_path: Path
) -> None:
    alpha, beta = pods
    held = hold(alpha, beta)
    for pod in pods:
        annotate(pod, outbound=str(APP_TCP_PORT))
    wait_until(lambda: len(sidestep_json(node, "deny")) == 2, "the ports to be denied", 30)
    proc = tmp_path / "proc"  # in which alpha's process is, and nobody of beta
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/net").symlink_to("/proc/self/ns/net")
    (proc / str(held.pid)).symlink_to(f"/proc/{held.pid}")
    done = sidestep(node, "deny", "--kill", "--proc", proc)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] in ("1 connection reset", "2 connections reset")  # the proxy's own may be gone
    why = f"network namespace not found below {proc}; give a procfs of the node with --proc"
    assert done.stderr == f"sidestep: some denied connections are still open: default/beta: {why}\n"
    assert held.communicate(timeout=30)[0] == "reset\n"


def test_a_wrong_procfs_is_one_line(node: Node, pods: tuple[Pod, Pod]) -> None:
    done = sidestep(node, "deny", "--kill", "--proc", "/never")
    assert done.returncode == 1
    assert done.stderr.startswith("sidestep: /never is no procfs of this node; give one with --proc: ")
    assert done.stderr.count("\n") == 1


def test_piped_a_row_is_one_line(node: Node, pods: tuple[Pod, Pod]) -> None:
    ports = ",".join(map(str, range(60000, 60008)))
    annotate(pods[0], outbound=ports)
    wait_until(lambda: bool(sidestep_json(node, "deny")), "the ports to be denied", 30)
    text = sidestep(node, "deny").stdout
    assert any(" alpha " in line and ports in line for line in text.splitlines()), text


def test_an_unknown_pod_is_one_line(node: Node, pods: tuple[Pod, Pod]) -> None:
    done = sidestep(node, "deny", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sidestep: no enrolled pod is called nobody; enrolled pods: default/alpha, default/beta\n"


def assert_denied_while_it_runs(client: Pod, server: Pod) -> None:
    """A change of the client's annotation ends what the client does all the time: connect."""
    argv = ["python3", "-I", "-S", "-c", CONNECTING, str(server.ip4), str(APP_TCP_PORT)]
    connecting = client.popen(argv, stdout=-1, text=True)
    assert connecting.stdout.readline() == "connected\n"
    annotate(client, outbound=str(APP_TCP_PORT))
    assert connecting.communicate(timeout=30)[0] == "refused\n"


@pytest.mark.parametrize("source", ["directory", "api"])
def test_a_change_counts_whoever_tells_of_it(source: str) -> None:
    with ExitStack() as stack:
        api = stack.enter_context(ApiServer().running()) if source == "api" else None
        node = stack.enter_context(Node(api=api))
        alpha, beta = node.pod("alpha"), node.pod("beta")
        assert_denied_while_it_runs(alpha, beta)
