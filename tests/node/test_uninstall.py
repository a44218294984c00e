"""What ends with a DaemonSet, and what only a person ends: the plugin, and the capture of pods that run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import invocation
from tests.lab.apiserver import ApiServer
from tests.lab.node import REPOSITORY, Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until

DAEMONSET = ("istio-system", "istio-cni-node")
PRIMARY = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}


class Installed:
    """A node whose agent has put the plugin into a chain."""

    def __init__(self, node: Node, api: ApiServer, host: Path) -> None:
        self.node, self.api = node, api
        self.bin, self.conf = host / "bin", host / "net.d" / "10-a.conflist"
        for directory in (self.bin, self.conf.parent):
            directory.mkdir()
        self.conf.write_text(json.dumps(PRIMARY))
        self.directories: list[str | Path] = ["--mounted-cni-bin-dir", self.bin]
        self.directories += ["--mounted-cni-net-dir", self.conf.parent]
        node.agent.options += ["--install", "--shim", node.shim, *self.directories]

    def document(self) -> Any:
        return json.loads(self.conf.read_text())

    def is_installed(self) -> bool:
        return self.document() != PRIMARY and (self.bin / "sidestep-cni").exists()

    def uninstall(self, *more: str) -> "subprocess.CompletedProcess[str]":
        options = ["--bpffs", self.node.bpffs, "--cni-agent-run-dir", self.node.run_dir, *self.directories]
        return subprocess.run(
            [sys.executable, "-m", "installer", "uninstall", *map(str, options), *more],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Installed]:
    with ApiServer().running() as api:
        api.put_daemonset(*DAEMONSET)
        node = Node(api=api)
        made = Installed(node, api, tmp_path)
        with node:
            wait_until(made.is_installed, "the plugin in the chain")
            yield made


@pytest.mark.claim("the plugin goes; running pods stay captured, new ones are not")
def test_with_its_daemonset_goes_the_plugin_and_no_pod_loses_capture(installed: Installed) -> None:
    node = installed.node
    alpha, beta = node.pod("alpha"), node.pod("beta")
    installed.api.delete_daemonset(*DAEMONSET)
    node.agent.terminate()
    assert installed.document() == PRIMARY
    assert not (installed.bin / "sidestep-cni").exists()
    assert "event=capture.goes_on pods=2" in node.agent.log.read_text()
    assert_captured(alpha, beta)

    refused = installed.uninstall()
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "sidestep: 2 running mesh pods of this node would lose capture, and with it mTLS: default/alpha, default/beta; "
        "to end it for them give --end-capture, to remove only the plugin give --keep-capture\n"
    )
    assert_captured(alpha, beta)
    refused = invocation.sidestep("detach", "--bpffs", node.bpffs)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "sidestep: 2 running mesh pods of this node would lose capture, and with it mTLS: default/alpha, default/beta; "
        "to end it for them give --end-capture\n"
    )
    assert_captured(alpha, beta)

    node.agent.start()  # a later agent finds them, and the plugin is back
    wait_until(installed.is_installed, "the plugin in the chain")
    assert_captured(alpha, beta)
    assert_captured(node.pod("gamma"), alpha)
    node.agent.terminate()
    kept = installed.uninstall("--keep-capture")
    assert len(kept.stdout.splitlines()) == 2
    assert_captured(alpha, beta)
    node.pods["gamma"].stop()  # while nobody serves

    ended = installed.uninstall("--end-capture")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        f"programs detached, pins in {node.bpffs / 'sidestep'} removed",
        "2 running mesh pods are not captured any more: default/alpha, default/beta",
    ]
    assert alpha.curl(beta.ip4).pod == "beta"
    assert alpha.envoy.connections() == beta.envoy.connections() == []


def assert_captured(one: Pod, other: Pod) -> None:
    for pod in (one, other):
        pod.envoy.connections()
    for ip in other.ips:
        assert one.curl(ip).pod == other.name
        assert one.envoy.next_connection().listener == "outbound"
        assert other.envoy.next_connection().listener == "inbound"


def test_an_agent_whose_pod_is_deleted_by_force_leaves_everything(installed: Installed) -> None:
    wait_until(lambda: installed.api.daemonset_watchers(DAEMONSET[0]) == 1, "the watch", 30)
    installed.api.token = "of another pod"
    installed.node.agent.terminate()
    assert installed.is_installed()
    assert (installed.node.bpffs / "sidestep").exists()
    assert "`sidestep uninstall --keep-capture`" in installed.node.agent.log.read_text()


def test_an_agent_whose_account_went_with_its_daemonset_takes_the_plugin_away(installed: Installed) -> None:
    wait_until(lambda: installed.api.daemonset_watchers(DAEMONSET[0]) == 1, "the watch", 30)
    installed.api.token = "of nobody"
    installed.api.delete_daemonset(*DAEMONSET)
    wait_until(lambda: "daemonset.deleted" in installed.node.agent.log.read_text(), "the deletion to be seen", 30)
    assert installed.is_installed()
    installed.node.agent.terminate()
    assert installed.document() == PRIMARY
    assert not (installed.bin / "sidestep-cni").exists()
    assert (installed.node.bpffs / "sidestep").exists()


def test_uninstalling_under_a_running_agent_is_refused(installed: Installed) -> None:
    refused = installed.uninstall()
    assert (refused.returncode, refused.stderr) == (
        1,
        f"sidestep: an agent serves {installed.node.run_dir} and would put everything back; "
        "first delete its DaemonSet, or stop it\n",
    )
    assert installed.is_installed()
    installed.node.agent.terminate()  # its DaemonSet is there: it leaves everything
    assert installed.is_installed()
    done = installed.uninstall()
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            f"plugin removed from {installed.conf}",
            f"{installed.bin / 'sidestep-cni'} removed",
            f"programs detached, pins in {installed.node.bpffs / 'sidestep'} removed",
        ],
    )
    assert installed.document() == PRIMARY
    again = installed.uninstall()
    assert (again.returncode, again.stdout) == (0, "nothing was installed\n")
    assert json.loads(installed.uninstall("--output", "json").stdout) == {"done": []}
