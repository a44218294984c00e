"""Processes of an enrolled pod that no program sees: every command names them, and unknown counts as bad."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpf.kernel import cgroup2_root
from tests.lab.apiserver import ApiServer
from tests.lab.command import sidestep, sidestep_json
from tests.lab.inside import popen
from tests.lab.node import REPOSITORY, Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh
from tests.node.sidestep import document
from tests.node.sidestep import sidestep as with_source
from tests.node.test_elsewhere import choosing, is_captured, places, seen
from tests.node.test_observation import scrape
from tests.node.test_status import options
from tests.node.test_top import Terminal

STRAYS = "stray processes, whose outbound connections are not captured"


@pytest.fixture
def outside(node: Node) -> Path:
    """A cgroup beside the attach point."""
    made = node.cgroup / "outside"
    made.mkdir()
    return made


@contextmanager
def stray(pod: Pod, cgroup: Path) -> Iterator[int]:
    """As `nsenter --net` from a shell of the node: a process in the pod's namespace and in another cgroup."""
    process = popen(pod.netns, cgroup, ["sleep", "120"], 0, 0)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def path_of(cgroup: Path) -> str:
    """As /proc/PID/cgroup has it."""
    return f"/{cgroup.parent.name}/{cgroup.name}"


def move(pod: Pod, to: Path) -> None:
    """All processes of a pod, as somebody does who writes to cgroup.procs."""
    for process in (pod.cgroup / "cgroup.procs").read_text().split():
        (to / "cgroup.procs").write_text(process)


@pytest.mark.claim("its outbound connections and DNS queries go past the proxy")
def test_every_command_names_a_stray_process(node: Node, outside: Path) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    beta = node.pod("beta")
    alpha.envoy.connections()
    with stray(alpha, outside) as pid:
        alpha.cgroup, inside = outside, alpha.cgroup
        assert alpha.curl(gamma.ip4).pod == "gamma"
        alpha.cgroup = inside
        assert alpha.envoy.connections() == []  # which is why it has to be said
        here = {"pid": pid, "name": "sleep", "cgroup": path_of(outside)}
        words = f"{STRAYS}: {pid} sleep (cgroup {path_of(outside)})"

        told = sidestep(node, "status", *options(node)[2:])
        assert told.returncode == 1
        assert f"✗ processes: default/alpha: {words}" in told.stdout.splitlines()
        assert document(node, "status", *options(node)[2:], status=1)["pods_with_strays"] == ["default/alpha"]

        of = {each["pod"]: each["processes"] for each in document(node, "pods")}
        assert (of["default/alpha"]["strays"], of["default/beta"]["strays"]) == ([here], [])
        assert of["default/alpha"]["captured"] > 0
        states = [line.split()[2:4] for line in with_source(node, "pods").stdout.splitlines() if " default " in line]
        assert [state[0] for state in states] == ["stray", "captured"]
        table = with_source(node, "pods", "-o", "wide").stdout.splitlines()
        assert [line.split()[-5] for line in table if " default " in line] == ["1", "0"]
        assert f"    {pid} sleep (cgroup {path_of(outside)})" in with_source(node, "pods", "alpha").stdout

        asked = ("explain", "alpha", f"{gamma.ip4}:8080")
        explained = sidestep_json(node, *asked, "--try")
        assert (explained["verdict"], explained["try"]["agrees"]) == ("captured", True)
        assert explained["processes"]["strays"] == [here]
        assert f"  but not     {STRAYS}:" in sidestep(node, *asked).stdout.splitlines()

        assert f"default/alpha: {words}" in sidestep(node, "report", "--seconds", "0.1").stdout
        report = json.loads(sidestep(node, "report", "--seconds", "0.1", "--output", "json").stdout)
        assert {each["pod"]: each["processes"] for each in report["pods"]} == of
        traced = sidestep(node, "trace", "--seconds", "0.1").stderr.splitlines()
        assert f"sidestep: default/alpha: {words}; they are not traced" in traced
        terminal = Terminal(Mesh(node, alpha, beta, gamma))
        terminal.shows("1 with stray processes", "default/alpha", " stray processes: 1 ")
        terminal.press(b"q")
        assert terminal.ends() == 0
    assert sidestep(node, "status", *options(node)[2:]).returncode == 0
    assert document(node, "pods", "alpha")["processes"]["strays"] == []


def test_a_pod_whose_processes_are_all_strays_is_explained_as_direct(node: Node, outside: Path) -> None:
    alpha, gamma = node.pod("alpha", envoy=False), node.pod("gamma", mesh=False)
    move(alpha, outside)
    found = sidestep_json(node, "explain", "alpha", f"{gamma.ip4}:8080", "--try")
    assert (found["verdict"], found["rule"], found["try"]["agrees"]) == ("direct", "stray", True)
    assert found["processes"]["captured"] == 0
    said = sidestep(node, "explain", "alpha", f"{gamma.ip4}:8080").stdout
    assert "direct, rule stray: all of the pod's processes are stray processes" in said


def test_a_process_in_a_cgroup_below_the_pods_is_no_stray(node: Node) -> None:
    alpha = node.pod("alpha")
    deep = alpha.cgroup / "container" / "init"
    deep.mkdir(parents=True)
    with stray(alpha, deep):
        assert document(node, "pods", "alpha")["processes"]["strays"] == []
        assert sidestep(node, "status", *options(node)[2:]).returncode == 0


def test_the_metric_follows(node: Node, outside: Path) -> None:
    alpha = node.pod("alpha", envoy=False)
    assert scrape(node)["sidestep_stray_processes",] == 0
    with stray(alpha, outside), stray(alpha, outside):
        assert scrape(node)["sidestep_stray_processes",] == 2
    assert scrape(node)["sidestep_stray_processes",] == 0
    assert scrape(node)["sidestep_pods_processes_unknown",] == 0


def test_the_pods_owner_and_the_log_are_told_once(tmp_path: Path) -> None:
    with ApiServer().running() as api, Node(api=api) as node:
        alpha = node.pod("alpha", envoy=False)
        outside = node.cgroup / "outside"
        outside.mkdir()
        with stray(alpha, outside) as pid:
            wait_until(lambda: bool(_told(api)), "the Event", 30)
            (event,) = _told(api)
            assert event["type"] == "Warning"
            assert event["message"] == f"{STRAYS}: {pid} sleep (cgroup {path_of(outside)})"
            line = f"event=process.not_captured pod=default/alpha pid={pid} name=sleep"
            wait_until(lambda: line in node.agent.log.read_text(), "the line")
        node.agent.terminate()
        assert node.agent.log.read_text().count("event=process.not_captured") == 1


def _told(api: ApiServer) -> list[dict[str, Any]]:
    return [each for each in api.events if each["reason"] == "NotCaptured"]


def status_through(node: Node, *wrapper: str) -> tuple[int, str]:
    """What `sidestep status` says when it has another view of the machine."""
    argv = [*wrapper, sys.executable, "-m", "installer", "status", *map(str, options(node))]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_without_the_nodes_processes_it_is_unknown(node: Node) -> None:
    node.pod("alpha")
    blind = status_through(node, "unshare", "--pid", "--fork", "--mount-proc")
    why = "/proc does not show the processes of pods; give a procfs of the node with --proc"
    line = "? processes: stray processes: unknown: {} (1 of 1 pods: default/alpha)"
    assert (blind[0], line.format(why) in blind[1].splitlines()) == (3, True)
    weak = status_through(node, "setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
    why = "without CAP_SYS_PTRACE; run as root with all capabilities"
    assert (weak[0], line.format(why) in weak[1].splitlines()) == (3, True)


def of_the_pod(pod: Pod) -> Path:
    """A cgroup that a runtime with the systemd driver would make for the pod, in another tree."""
    made = pod.node.cgroup / "kubepods.slice" / f"kubepods-pod{pod.uid.replace('-', '_')}.slice"
    made.mkdir(parents=True)
    return made


@pytest.mark.claim("the pod's processes run uncaptured if they are not below an attach point")
def test_processes_in_another_tree_of_pods_are_captured_there() -> None:
    with choosing(Node()) as node:
        gamma, alpha = node.pod("gamma", mesh=False), node.pod("alpha")
        other = of_the_pod(alpha)
        move(alpha, other)
        alpha.cgroup = other
        wait_until(lambda: len(places(node)) == 2, "the agent to attach there", 30)
        assert places(node) == seen(node, "kubepods", "kubepods.slice")
        assert is_captured(alpha, gamma)
        assert "event=process.not_captured" not in node.agent.log.read_text()


def test_where_nothing_may_be_attached_the_reason_is_told() -> None:
    with ApiServer().running() as api, Node(api=api) as node:
        alpha = node.pod("alpha", envoy=False)
        other = of_the_pod(alpha)
        move(alpha, other)
        wait_until(lambda: bool(_told(api)), "the Event", 30)
        (event,) = _told(api)
        assert f"(cgroup /{other.relative_to(cgroup2_root())})" in event["message"]
        why = f"the programs can't be attached there: --cgroup says {node.kubepods}; "
        assert why in event["message"]
