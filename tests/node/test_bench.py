"""The benchmark runs: real Envoys and load generators, one round of a second."""

import json
import subprocess
import sys
from pathlib import Path

from tests.lab.node import REPOSITORY

SCENARIOS = ("iptables", "full", "unix")
WORKLOADS = ("new-connection-http", "ping-pong-http", "stream-1024")  # each of the load generators


def test_a_quick_run_writes_figures_page_and_plots(tmp_path: Path) -> None:
    only = [word for name in (*SCENARIOS, *WORKLOADS) for word in ("--only", name)]
    argv = [sys.executable, "-m", "tests.bench.mesh", "--quick", *only, "--output", str(tmp_path)]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "mesh.json").read_text())
    assert run["failures"] == []
    seen = {(each["workload"], each["scenario"]) for each in run["samples"]}
    assert seen == {(workload, scenario) for workload in WORKLOADS for scenario in SCENARIOS}
    assert all(each["figures"]["requests"] > 0 and each["figures"]["errors"] == 0 for each in run["samples"])
    assert all(each["spent"]["pods"] > 0 for each in run["samples"])
    assert run["traffic"]["full"]["redirected"] > 0
    plots = {"mesh-rate.svg", "mesh-p50.svg", "mesh-p99.svg", "mesh-cpu.svg", "mesh-pods-cpu.svg"}
    assert {each.name for each in tmp_path.iterdir()} == {"mesh.json", "mesh.md", *plots}
