"""An agent with little memory: it says so before it is killed for it, and the least that it asks for suffices."""

from pathlib import Path

import pytest

from bpf.pins import Pins
from installer.probe.memory import NEEDED
from tests.lab.apiserver import ApiServer
from tests.lab.limits import MEMORY, limited_cgroup, moving_to
from tests.lab.node import Node


def kills(cgroup: Path) -> int:
    return int((cgroup / "memory.oom_control").read_text().rpartition("oom_kill ")[2])


def test_an_agent_with_too_little_says_so_and_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    with limited_cgroup(MEMORY, 96 << 20) as cgroup:
        node = Node()
        node.agent_wrapper = moving_to(cgroup)
        with pytest.raises(RuntimeError, match="the agent has ended") as ended, node:
            raise AssertionError("the agent serves")
        assert "memory limit 96 MiB" in str(ended.value)
        (row,) = [each for each in str(ended.value).splitlines() if each.startswith(" memory limit ")]
        assert "set resources.limits.memory to 512Mi" in row
        assert kills(cgroup) == 0
        assert not Pins(node.bpffs).top.exists()


def test_an_agent_with_the_least_that_it_asks_for_compiles_and_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDESTEP_BYTECODE", str(tmp_path / "bytecode"))  # nothing is kept there
    # with an API server, whose client is a large part of the agent
    with limited_cgroup(MEMORY, NEEDED) as cgroup, ApiServer().running() as api:
        node = Node(api=api)
        node.agent_wrapper = moving_to(cgroup)
        with node:
            alpha, beta = node.pod("alpha"), node.pod("beta")
            assert alpha.curl(beta.ips[0]).pod == "beta"
        assert list((tmp_path / "bytecode").iterdir()), "it has not compiled"
        assert kills(cgroup) == 0
