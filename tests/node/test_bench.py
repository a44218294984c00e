"""The benchmark runs: real Envoys and load generators, one round of a second."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.mesh import establishing, servers
from tests.bench.mesh.scenarios import BASELINE
from tests.lab.node import REPOSITORY, Node

SCENARIOS = ("iptables", "full", "unix")
# each of the load generators, and each kind of port
WORKLOADS = ("new-connection-mtls-ecdsa", "ping-pong-http", "stream-1024")


def quick_run(output: Path, *names: str) -> dict[str, Any]:
    only = [word for name in names for word in ("--only", name)]
    argv = [sys.executable, "-m", "tests.bench.mesh", "--quick", *only, "--output", str(output)]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run: dict[str, Any] = json.loads((output / "mesh.json").read_text())
    return run


def test_a_quick_run_writes_figures_page_and_plots(tmp_path: Path) -> None:
    run = quick_run(tmp_path, *SCENARIOS, *WORKLOADS)
    assert run["failures"] == []
    seen = {(each["workload"], each["scenario"]) for each in run["samples"]}
    assert seen == {(workload, scenario) for workload in WORKLOADS for scenario in SCENARIOS}
    assert all(each["figures"]["requests"] > 0 and each["figures"]["errors"] == 0 for each in run["samples"])
    assert all(each["spent"]["pods"] > 0 for each in run["samples"])
    messages = {(each["workload"], each["scenario"]): each["messages"] for each in run["samples"]}
    redirected = [messages[workload, "full"]["redirected"] for workload in WORKLOADS]
    assert min(redirected) > 0 and sum(redirected) <= run["traffic"]["full"]["redirected"]
    assert not any(messages[workload, "unix"] for workload in WORKLOADS)
    assert "| gRPC-like ping-pong, HTTP, mTLS | full | " in (tmp_path / "mesh.md").read_text()
    plots = {"mesh-rate.svg", "mesh-p50.svg", "mesh-p99.svg", "mesh-cpu.svg", "mesh-pods-cpu.svg"}
    assert {each.name for each in tmp_path.iterdir()} == {"mesh.json", "mesh.md", *plots}


def test_what_is_measured_beside_the_load_has_its_table(tmp_path: Path) -> None:
    run = quick_run(tmp_path, "tax")
    assert [len(block["rows"]) for block in run["beside"]] == [5]
    assert "## Tax on a process outside of the mesh" in (tmp_path / "mesh.md").read_text()


def test_connections_are_established_as_they_should_be_either_way() -> None:
    made = establishing.block(1, (BASELINE.name, "full"))
    counted = () if "counts no cycles" in made.note else (establishing.CYCLES,)  # virtual machines rarely do
    assert [row[0] for row in made.rows] == [
        f"{direction}, {what}" for direction in ("outbound", "inbound") for what in (*establishing.CALLS, *counted)
    ]


@pytest.fixture
def served(node: Node) -> servers.Servers:
    """A pod whose application has one of the servers' ports."""
    files = node.directory / "files"
    files.mkdir()
    files.chmod(0o1777)
    return servers.Servers(node.pod("server", mesh=False), files, unix=False)


def test_a_port_of_a_server_that_is_taken_is_told_with_its_owner(served: servers.Servers) -> None:
    with pytest.raises(servers.ServerAbsent, match=r"(?s)port 8080 is taken; .*:8080 .*python"):
        served.start()


def test_a_server_that_ends_is_told_with_what_it_said(served: servers.Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_NGINX", "frobnicate;")
    monkeypatch.setattr(served, "_answers", lambda _: False)
    told = r'(?s)port 8080: the server ended with 1; nginx has said:.*unknown directive "frobnicate"'
    with pytest.raises(servers.ServerAbsent, match=told):
        served.start()


def test_a_server_that_does_not_come_is_told_with_what_is_there(
    served: servers.Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_SLOWEST_SECONDS", 0.2)
    monkeypatch.setattr(served, "_answers", lambda _: False)
    told = r"(?s)waited 0\.2 s for port 8080; the server runs and has used \d+\.\d+ s .*0\.0\.0\.0:8080 .*python"
    with pytest.raises(servers.ServerAbsent, match=told):
        served.start()
