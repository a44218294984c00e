"""Two agents on one bpffs, each with a run directory of its own: the second is refused and changes nothing."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.node import REPOSITORY, Node
from tests.lab.waiting import wait_until


def second_agent(node: Node, run_dir: Path) -> "subprocess.CompletedProcess[str]":
    argv = ["--bpffs", node.bpffs, "--cgroup", node.kubepods, "--pods", node.pods_dir, "--cni-agent-run-dir", run_dir]
    return subprocess.run(
        [sys.executable, "-m", "installer", "agent", *map(str, argv), "--health-port", "0", "--monitoring-port", "0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.claim("A second agent waits 3 s and is then refused")
def test_the_second_agent_is_refused_and_told_who_is_the_first(node: Node, tmp_path: Path) -> None:
    node.pod("alpha", envoy=False, app=False)
    before = node.policies()
    for _ in range(2):
        refused = second_agent(node, tmp_path / "run")
        assert refused.returncode == 1
        who = f"{socket.gethostname()}, process {node.agent.pid}"
        assert refused.stderr.splitlines()[-1] == (
            f"sidestep: another agent serves with the pins in {node.bpffs / 'sidestep'}: {who}; stop it, or give this "
            "one its own --bpffs"
        )
        assert node.policies() == before
        # again after somebody has removed everything, and the first has put it back
        shutil.rmtree(node.bpffs / "sidestep")
        wait_until((node.bpffs / "sidestep" / "holder").is_symlink, "the first to hold the pins again", 15)
        wait_until(lambda: node.is_whole(before), "everything to be back", 15)
    node.agent.kill()
    node.agent.start()  # a crash leaves a name, but no lock
