"""What the agent undoes at its end stays undone, and nobody undoes it under a running agent."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpf.syscalls import Descriptor
from tests.lab.apiserver import ApiServer
from tests.lab.node import REPOSITORY, Node
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


def test_what_an_agent_takes_away_at_its_end_it_does_not_put_back(installed: Installed) -> None:
    installed.api.delete_daemonset(*DAEMONSET)
    with Descriptor(os.open(installed.node.bpffs, os.O_RDONLY | os.O_DIRECTORY)) as bpffs:
        fcntl.flock(bpffs.fd, fcntl.LOCK_EX)  # between chain and programs it has to wait for us
        ending = threading.Thread(target=installed.node.agent.terminate)
        ending.start()
        wait_until(lambda: installed.document() == PRIMARY, "the entry to be gone")
        wait_until(lambda: not (installed.bin / "sidestep-cni").exists(), "the plugin to be gone")
        ending.join(0.5)  # time enough to put it back
        assert ending.is_alive()
        fcntl.flock(bpffs.fd, fcntl.LOCK_UN)
    ending.join()
    assert installed.document() == PRIMARY
    assert not (installed.bin / "sidestep-cni").exists()
    assert not (installed.node.bpffs / "sidestep").exists()


def test_an_agent_whose_pod_is_deleted_by_force_leaves_everything(installed: Installed) -> None:
    wait_until(lambda: installed.api.daemonset_watchers(DAEMONSET[0]) == 1, "the watch", 30)
    installed.api.token = "of another pod"
    installed.node.agent.terminate()
    assert installed.is_installed()
    assert (installed.node.bpffs / "sidestep").exists()
    assert "`sidestep uninstall`" in installed.node.agent.log.read_text()


def test_an_agent_whose_account_went_with_its_daemonset_undoes_everything(installed: Installed) -> None:
    wait_until(lambda: installed.api.daemonset_watchers(DAEMONSET[0]) == 1, "the watch", 30)
    installed.api.token = "of nobody"
    installed.api.delete_daemonset(*DAEMONSET)
    wait_until(lambda: "daemonset.deleted" in installed.node.agent.log.read_text(), "the deletion to be seen", 30)
    assert installed.is_installed()
    installed.node.agent.terminate()
    assert installed.document() == PRIMARY
    assert not (installed.node.bpffs / "sidestep").exists()


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
