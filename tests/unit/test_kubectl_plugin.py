"""The plugin for kubectl: one file that runs by itself, and what it makes of what agents tell.

`make cluster` runs it against a cluster (tests/cluster/scenarios/plugin.py).
"""

import subprocess
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from installer import VERSION
from installer.commands.kubectl_plugin import plugin
from installer.kubectl.agents import agents_pods, has_sidecar
from installer.kubectl.cluster_status import NodeStatus, judged, show_status, verdict_on, without_agent
from installer.kubectl.connectivity import wrong_with
from installer.kubectl.kubectl import KubectlFailed
from installer.kubectl.whereabouts import named_pod

FAULT = {"state": "wrong", "part": "programs", "what": "connect4 not attached", "advice": "start the agent"}


class Telling:
    """An agent's answer."""

    pod, image = "istio-cni-node-abcde", "sidestep:1"

    def __init__(self, told: Any) -> None:
        self._told = told

    def ask(self, *_: str) -> Any:
        if isinstance(self._told, Exception):
            raise self._told
        return self._told


def status(told: Any) -> NodeStatus:
    return judged("node-1", Telling(told))  # type: ignore[arg-type]


def run(tmp_path: Path, *argv: str, path: str = "") -> subprocess.CompletedProcess[str]:
    file = tmp_path / "kubectl-sidestep"
    file.write_bytes(plugin())
    file.chmod(0o755)
    environment = {"PATH": f"{path}:/usr/bin:/bin", "PYTHONPATH": "", "HOME": str(tmp_path)}
    return subprocess.run(
        ["/usr/bin/python3", "-I", "-S", file, *argv], env=environment, capture_output=True, text=True, cwd=tmp_path
    )


def test_it_runs_with_a_python_that_has_no_packages(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"kubectl sidestep {VERSION}\n"


def test_it_brings_nothing_of_the_nodes_side() -> None:
    places = {name.partition("/")[0] for name in zipfile.ZipFile(BytesIO(plugin())).namelist()}
    assert places == {"__main__.py", "installer", "click", "rich"}


def test_what_kubectl_refuses_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--kubeconfig", "/nowhere", "status")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("argv", [("status",), ("explain", "alpha", "beta:80"), ("pods",)])
def test_without_a_cluster_every_command_says_what_kubectl_says(tmp_path: Path, argv: tuple[str, ...]) -> None:
    done = run(tmp_path, *argv)  # there is no kubeconfig, so no current context
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: The connection to the server localhost:8080 ")


def pod(name: str, app: str, node: str = "node-1", phase: str = "Running", **metadata: str) -> dict[str, Any]:
    labels = {"k8s-app": app}
    return {
        "metadata": {"name": name, "labels": labels, **metadata},
        "spec": {"nodeName": node},
        "status": {"phase": phase},
    }


@pytest.mark.parametrize("turned", [False, True])
def test_beside_istio_cni_the_agents_in_shadow_mode_are_asked(turned: bool) -> None:
    istios = [pod("istio-cni-node-a", "istio-cni-node"), pod("istio-cni-node-b", "istio-cni-node", "node-2")]
    pods = [*istios, pod("ours", "sidestep-shadow-node"), pod("starts", "sidestep-shadow-node", "node-2", "Pending")]
    found = agents_pods(reversed(pods) if turned else pods)
    assert {node: each["metadata"]["name"] for node, each in found.items()} == {
        "node-1": "ours",
        "node-2": "istio-cni-node-b",
    }


@pytest.mark.parametrize("turned", [False, True])
def test_an_agent_that_ends_is_not_asked_if_another_has_come(turned: bool) -> None:
    going = pod("going", "sidestep-shadow-node", deletionTimestamp="2026-01-01T00:00:00Z")
    pods = [going, pod("stays", "istio-cni-node")]
    assert agents_pods(reversed(pods) if turned else pods)["node-1"]["metadata"]["name"] == "stays"
    assert agents_pods([going])["node-1"]["metadata"]["name"] == "going"


def test_without_kubectl_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    file = tmp_path / "kubectl-sidestep"
    alone = {"PATH": str(tmp_path)}
    told = subprocess.run(["/usr/bin/python3", "-I", "-S", file, "status"], env=alone, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (1, "Error: kubectl is not on the PATH\n")


def test_an_agents_verdict_is_the_nodes() -> None:
    told = {"verdict": {"state": "wrong", "headline": "WRONG: one thing", "findings": [FAULT]}, "pods": [{}, {}]}
    assert status(told) == NodeStatus("node-1", "wrong", "WRONG: one thing", 2, (FAULT,))


@pytest.mark.parametrize("told", [KubectlFailed("Forbidden"), {}, {"attached": True}, []])
def test_an_agent_that_tells_no_verdict_is_unknown_and_never_well(told: Any) -> None:
    assert status(told).state == "unknown"


def test_a_node_without_an_agent_is_wrong_if_sidecars_run_there() -> None:
    assert (without_agent("node-1", 3).state, without_agent("node-1", 0).state) == ("wrong", "ok")


def test_one_node_decides_for_the_cluster() -> None:
    well, wrong, unknown = (NodeStatus("n", state, "") for state in ("ok", "wrong", "unknown"))
    assert verdict_on([well, well]) == ("ok", "OK: nothing is wrong on 2 nodes")
    assert verdict_on([well, unknown]) == ("unknown", "UNKNOWN: 1 of 2 nodes can't be told")
    assert verdict_on([unknown, wrong]) == (
        "wrong",
        "WRONG: 1 of 2 nodes with something wrong; 1 of 2 nodes can't be told",
    )
    assert verdict_on([])[0] == "unknown"


def test_each_fault_is_told_with_its_node_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    found = [NodeStatus("node-1", "ok", "OK: fine", 3), NodeStatus("node-2", "wrong", "WRONG: one thing", 1, (FAULT,))]
    assert show_status(found) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "WRONG: 1 of 2 nodes with something wrong"
    assert "✗ node-2: programs: connect4 not attached" in lines
    assert lines[-1].strip() == "→ start the agent"


def test_a_connection_counts_only_if_both_ends_captured_it() -> None:
    answer = {"server": "pod-1", "caller": "127.0.0.6"}
    assert wrong_with(answer, "pod-1", 1, 1) == ""
    assert wrong_with(answer, "pod-1", 0, 1) == "NOT captured at the client"
    assert wrong_with(answer, "pod-1", 1, 0) == "NOT captured at the server"
    assert wrong_with(answer, "pod-1", 1, None) == "no agent knows the server's pod"
    assert wrong_with(answer, "pod-2", 1, 1) == "pod-1 has answered"
    assert "not by its proxy" in wrong_with({**answer, "caller": "10.0.0.1"}, "pod-1", 1, 1)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("db-0:5432", ("db-0", "5432")),
        ("shop/db-0", ("shop/db-0", "")),
        ("10.0.0.7:443", None),
        ("[fd00::7]:443", None),
        ("--inbound", None),
        ("10.96.0.10:53/udp", None),
    ],
)
def test_explain_is_told_pods_from_addresses(argument: str, named: tuple[str, str] | None) -> None:
    assert named_pod(argument) == named


def test_a_pod_with_the_nodes_network_has_no_sidecar_to_capture_for() -> None:
    proxy = {"name": "istio-proxy"}
    assert has_sidecar({"spec": {"containers": [{"name": "app"}, proxy]}})
    assert has_sidecar({"spec": {"containers": [{"name": "app"}], "initContainers": [proxy]}})
    assert not has_sidecar({"spec": {"containers": [proxy], "hostNetwork": True}})
    assert not has_sidecar({"spec": {"containers": [{"name": "app"}]}})
