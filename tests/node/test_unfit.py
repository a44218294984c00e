"""An agent on a node whose kernel does not take its programs: its log says what a probe would, and nothing is left."""

import os
import re
from pathlib import Path

import pytest

from bpf.attachment import detach_programs, is_attached
from bpf.hooks import CGROUP_HOOKS
from bpf.pins import Pins
from bpf.syscalls import Descriptor, attached_to
from tests.datapath.test_loading import HELPER, REFUSED_PROGRAM
from tests.lab.node import Node
from tests.lab.sources import changed_copy


def test_the_log_of_a_node_that_cannot_capture_is_the_table(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    node.agent.terminate()
    detach_programs(Pins(node.bpffs))
    with pytest.raises(RuntimeError, match="the agent has ended") as ended:
        node.agent.start(changed_copy(tmp_path, *REFUSED_PROGRAM))
    log = str(ended.value).rpartition("this node can't capture: ")[2]
    summary, _, table = log.partition("\n")
    assert summary == f"sk_lookup {HELPER}"
    row = next(line for line in table.splitlines() if "verdict" not in line and line.strip(" ─"))  # the first
    advice = r"use a kernel that has it: Linux 5\.9 or newer \(5\.15 for all of sidestep\)"
    assert re.fullmatch(rf" sk_lookup +inbound capture +{HELPER} +no +{advice}.*", row)
    assert table.splitlines()[-1].startswith("capture will not work here: ")
    assert "Traceback" not in log
    assert not Pins(node.bpffs).top.exists()
    assert not [each for each in node.kubepods.iterdir() if each.is_dir()]
    with Descriptor(os.open(node.kubepods, os.O_RDONLY | os.O_DIRECTORY)) as cgroup:
        assert not any(attached_to(cgroup.fd, hook.attach_type).programs for hook in CGROUP_HOOKS)


def test_pods_stay_captured_by_the_programs_of_before(node: Node, tmp_path: Path) -> None:
    node.pod("alpha")
    before = node.policies()
    node.agent.terminate()
    with pytest.raises(RuntimeError, match=f"this node can't capture: sk_lookup {HELPER}"):
        node.agent.start(changed_copy(tmp_path, *REFUSED_PROGRAM))
    assert node.policies() == before
    assert is_attached(Pins(node.bpffs))
    node.agent.start()
    assert node.entries()["pods"] == before["pods"] == 1
