"""A node's life with a real containerd: whatever happens, a mesh pod is captured or refused, never silently open.

All pods are made through CRI and all requests come from inside their containers. The tests of a module follow one
another on one node, as the things they are about do.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bpf.kernel import cgroup2_root
from tests.lab.apiserver import ApiServer
from tests.lab.containerd import Containerd, CriPod, Refused, pure_cgroup2
from tests.lab.node import REPOSITORY, Node
from tests.lab.waiting import wait_until

DAEMONSET = ("istio-system", "istio-cni-node")


class Cluster:
    """A node with its runtime and its API server."""

    def __init__(self, layout: str, running: ExitStack) -> None:
        self.api = running.enter_context(ApiServer().running())
        self.api.daemonsets[DAEMONSET] = {"metadata": {"name": DAEMONSET[1]}}
        self.node = Node(api=self.api)
        self.wrapper = pure_cgroup2() if layout == "pure" else []
        self.node.agent_wrapper = self.wrapper
        self.runtime = Containerd(self.node, self.wrapper)
        kubepods = self.node.kubepods
        if layout == "pure":
            kubepods = Path("/sys/fs/cgroup") / kubepods.relative_to(cgroup2_root())
        self.node.agent.cgroup = kubepods
        self.node.agent.options += ["--install", "--mounted-cni-bin-dir", self.runtime.bin]
        self.node.agent.options += ["--mounted-cni-net-dir", self.runtime.net]
        self.node.agent.options += ["--shim", self.node.shim, "--reconcile-seconds", "2"]
        self.node.before_agent = self.runtime.prepare
        running.enter_context(self.node)
        running.callback(self.runtime.stop)
        self.runtime.write_conf()
        self.runtime.start()
        self.runtime.import_images()
        self.wait_until_installed()
        self.pods: dict[str, CriPod] = {}

    def pod(self, name: str, mesh: bool = True) -> CriPod:
        """Make one, as kubelet does: again while the runtime refuses it for the network."""
        pod = CriPod(self.runtime, name, mesh)
        pod.create()
        self.pods[name] = pod
        return pod

    def wait_until_installed(self) -> None:
        wait_until(self.is_installed, "the plugin in the chain", 10)

    def is_installed(self) -> bool:
        conf = json.loads((self.runtime.net / "10-lab.conflist").read_text())
        shim = self.runtime.bin / "sidestep-cni"
        return shim.exists() and [plugin["type"] for plugin in conf["plugins"]][-1] == "sidestep-cni"

    def is_captured(self, one: CriPod, other: CriPod) -> bool:
        """Whether a request from inside one container reaches the other pod's application through both proxies."""
        for pod in (one, other):
            pod.envoy.connections()
        assert one.get(other.ip) == other.name
        deadline = time.monotonic() + 2
        seen: set[str] = set()
        while len(seen) < 2 and time.monotonic() < deadline:
            seen |= {f"{one.name} {each.listener}" for each in one.envoy.connections()}
            seen |= {f"{other.name} {each.listener}" for each in other.envoy.connections()}
            time.sleep(0.02)
        return seen == {f"{one.name} outbound", f"{other.name} inbound"}

    def captured_soon(self, one: CriPod, other: CriPod) -> None:
        """A pod that was made while the plugin was away has to be in the mesh within a reconciliation."""
        wait_until(lambda: self.is_captured(one, other) and self.is_captured(other, one), "capture both ways", 15)


@pytest.fixture(scope="module", params=["hybrid", "pure"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with ExitStack() as running:
        yield Cluster(request.param, running)


@pytest.fixture(scope="module")
def first(cluster: Cluster) -> CriPod:
    """In the mesh from the beginning to the end."""
    return cluster.pod("first")


def test_mesh_pods_are_captured_and_plain_ones_are_not(cluster: Cluster, first: CriPod) -> None:
    second, plain = cluster.pod("second"), cluster.pod("plain", mesh=False)
    assert cluster.is_captured(first, second)
    assert cluster.is_captured(second, first)
    plain.envoy.connections()
    first.envoy.connections()
    assert plain.get(first.ip) == "first"
    assert first.envoy.next_connection().listener == "inbound"
    assert first.get(plain.ip) == "plain"
    assert first.envoy.next_connection().listener == "outbound"


def test_without_the_agent_mesh_pods_are_refused_and_plain_ones_start(cluster: Cluster, first: CriPod) -> None:
    cluster.node.agent.kill()
    with pytest.raises(Refused, match=r"cannot reach .*cni.sock"):
        cluster.pod("refused")
    plain = cluster.pod("plain-without-agent", mesh=False)
    assert plain.get(first.ip) == "first"
    assert cluster.is_captured(cluster.pods["second"], first)
    cluster.node.agent.start()
    assert cluster.is_captured(first, cluster.pod("after-restart"))


def test_stopping_the_agent_changes_nothing(cluster: Cluster, first: CriPod) -> None:
    cluster.node.agent.terminate()
    assert cluster.is_installed()
    assert cluster.is_captured(cluster.pods["second"], first)
    with pytest.raises(Refused):
        cluster.pod("refused-too")
    cluster.node.agent.start()


def test_a_configuration_that_somebody_overwrites_is_repaired(cluster: Cluster, first: CriPod) -> None:
    cluster.runtime.write_conf()
    pod = cluster.pod("in-between")  # the runtime may have read either
    wait_until(cluster.is_installed, "the repair", 3)
    cluster.captured_soon(first, pod)
    assert cluster.is_captured(first, cluster.pod("after-repair"))


def test_pods_made_while_the_configuration_keeps_changing_are_captured(cluster: Cluster, first: CriPod) -> None:
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.wait(0.7):
            cluster.runtime.write_conf()

    rewriting = threading.Thread(target=rewrite)
    rewriting.start()
    made = []
    try:
        for number in range(4):
            with suppress(Refused):
                made.append(cluster.pod(f"fight{number}"))
    finally:
        stop.set()
        rewriting.join()
    for pod in made:
        cluster.captured_soon(first, pod)
    wait_until(cluster.is_installed, "the last repair", 5)


def test_a_plugin_that_somebody_deletes_comes_back(cluster: Cluster, first: CriPod) -> None:
    (cluster.runtime.bin / "sidestep-cni").unlink()
    with suppress(Refused):
        cluster.captured_soon(first, cluster.pod("while-deleted"))
    wait_until(cluster.is_installed, "the plugin", 3)
    assert cluster.is_captured(first, cluster.pod("after-deletion"))


def test_a_restart_of_the_runtime_loses_nothing(cluster: Cluster, first: CriPod) -> None:
    cluster.runtime.stop()
    cluster.runtime.start()
    assert cluster.is_captured(cluster.pods["second"], first)
    assert cluster.is_captured(first, cluster.pod("after-runtime"))


def test_an_upgrade_keeps_pods_and_captures_new_ones(cluster: Cluster, first: CriPod, tmp_path: Path) -> None:
    for package in ("bpf", "cni", "installer"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "bpf" / "facts.c"
    source.write_text(source.read_text() + "\n/* another version */\n")
    cluster.node.agent.terminate()
    cluster.node.agent.start(tmp_path)
    wait_until(lambda: "programs=swapped" in cluster.node.agent.log.read_text(), "the new programs", 5)
    assert cluster.is_captured(cluster.pods["second"], first)
    assert cluster.is_captured(first, cluster.pod("after-upgrade"))


def test_pods_that_end_leave_nothing(cluster: Cluster, first: CriPod) -> None:
    for name, pod in list(cluster.pods.items()):
        if name not in ("first", "second"):
            pod.remove()
            del cluster.pods[name]
    wait_until(lambda: cluster.node.entries()["pods"] == 2, "two pods to be left", 10)
    assert cluster.node.entries()["links"] == 2


def test_an_outage_of_the_api_server_lets_nobody_through(cluster: Cluster, first: CriPod) -> None:
    cluster.api.stop()
    try:
        pod = CriPod(cluster.runtime, "unheard-of")
        with pytest.raises(Refused, match=r"cannot be had|cannot be reached"):
            pod.create()
        plain = CriPod(cluster.runtime, "plain-unheard-of", mesh=False)
        plain.create()
        assert plain.get(first.ip) == "first"
    finally:
        cluster.api.start()
    wait_until(lambda: cluster.api.watchers == 1, "the watch again", 40)
    assert cluster.is_captured(first, cluster.pod("after-outage"))


def test_with_its_daemonset_goes_everything_but_live_connections(cluster: Cluster, first: CriPod) -> None:
    second = cluster.pods["second"]
    del cluster.api.daemonsets[DAEMONSET]
    cluster.node.agent.terminate()
    conf = json.loads((cluster.runtime.net / "10-lab.conflist").read_text())
    assert [plugin["type"] for plugin in conf["plugins"]] == ["bridge", "portmap"]
    assert not (cluster.runtime.bin / "sidestep-cni").exists()
    assert not (cluster.node.bpffs / "sidestep").exists()
    assert not cluster.is_captured(first, second)
    assert cluster.pod("after-uninstall").get(first.ip) == "first"
    argv = ["uninstall", "--bpffs", str(cluster.node.bpffs), "--mounted-cni-bin-dir", str(cluster.runtime.bin)]
    again = subprocess.run(
        [
            str(REPOSITORY / ".venv/bin/python"),
            "-m",
            "installer",
            *argv,
            "--mounted-cni-net-dir",
            str(cluster.runtime.net),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout) == (0, "nothing was installed\n")
