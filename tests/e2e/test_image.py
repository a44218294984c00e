"""The agent from the image, as the DaemonSet runs it: its capabilities, its mounts, a read-only root.

It gets Pods from an API server as in a cluster, by its service account. cgroups it sees as on a node that has cgroup2
alone, and finds kubelet's there by itself.
"""

import json
import re
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from cri_api.v1 import api_pb2 as cri

from installer import VERSION
from installer.pods.access import SERVICE_ACCOUNT
from tests.lab.apiserver import ApiServer
from tests.lab.containerd import Containerd
from tests.lab.cri import CriPod, Refused
from tests.lab.daemonset import as_daemonset
from tests.lab.inside import enter_netns
from tests.lab.node import NODE_NAME, REPOSITORY, Node
from tests.lab.waiting import wait_until

ARCHIVE = REPOSITORY / "build" / "image" / "sidestep.tar"
SBOM = REPOSITORY / "build" / "image" / "sbom.spdx.json"
NAME = "localhost/sidestep:latest"
DAEMONSET = ("istio-system", "istio-cni-node")


class Deployment:
    """A containerd with the DaemonSet's pod in it."""

    def __init__(self, running: ExitStack) -> None:
        self.api = ApiServer(authority=trustme.CA())
        self.api.daemonsets[DAEMONSET] = {"metadata": {"name": DAEMONSET[1]}}
        self.node = Node(api=self.api)
        self.runtime = Containerd(self.node)
        self.node.agent.start = lambda *_: None  # type: ignore[method-assign]
        self.node.before_agent = self.runtime.prepare
        running.enter_context(self.node)
        running.callback(self.runtime.stop)
        self._serve_api()
        running.callback(self.api.stop)
        self.runtime.write_conf()
        self.runtime.start()
        self.runtime.import_images()
        self.runtime.import_image(ARCHIVE)
        self.node.run_dir.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "CNI_AGENT_RUN_DIR": str(self.node.run_dir),
            "KUBERNETES_NODE_NAME": NODE_NAME,
            "POD_NAMESPACE": DAEMONSET[0],
            "KUBERNETES_SERVICE_HOST": self.api.address,
            "KUBERNETES_SERVICE_PORT": str(self.api.port),
        }
        host = {
            "/opt/cni/bin": self.runtime.bin,
            "/etc/cni/net.d": self.runtime.net,
            "/run/sidestep": self.node.run_dir,
            "/sys/fs/bpf": self.node.bpffs,
            "/sys/fs/cgroup": self.node.cgroup,
        }
        account = self.api.service_account(self.node.directory / "account")
        extra = {SERVICE_ACCOUNT: account, self.node.run_dir: self.node.run_dir}
        self.container = as_daemonset(self.runtime, self._objects(), NAME, settings, host, extra)

    def _serve_api(self) -> None:
        """From this process, on the loopback of the node, which is where the DaemonSet's pod is."""

        def serve() -> None:
            with self.node.netns.open() as netns:
                enter_netns(netns.fileno())
            self.api.start()

        inside = threading.Thread(target=serve)  # of its own, as there is no way back
        inside.start()
        inside.join()

    def _objects(self) -> list[dict[str, Any]]:
        built = subprocess.run(
            ["kubectl", "kustomize", REPOSITORY / "manifests" / "base"], capture_output=True, text=True, check=True
        )
        return list(yaml.safe_load_all(built.stdout))

    def readiness(self) -> str:
        ask = ["nsenter", f"--net={self.node.netns}", "curl", "-s", "-m", "2", "http://127.0.0.1:8000/readyz"]
        return subprocess.run(ask, capture_output=True, text=True).stdout

    def pod(self, name: str, annotations: Mapping[str, str] | None = None) -> CriPod:
        """A mesh pod."""
        pod = CriPod(self.runtime, name, True, annotations or {})
        pod.create()
        return pod

    def sidestep(self, *argv: str) -> Any:
        request = cri.ExecSyncRequest(container_id=self.container, cmd=["/usr/local/bin/sidestep", *argv], timeout=30)
        return self.runtime.stub.ExecSync(request, timeout=40)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    assert ARCHIVE.exists(), "run `make image` first"
    with ExitStack() as running:
        made = Deployment(running)
        try:
            wait_until(lambda: "ok" in made.readiness(), "the agent to be ready", 120)
        except TimeoutError:
            raise RuntimeError(f"{made.readiness()}\n{made.runtime.logs('install-cni')}") from None
        yield made


def test_it_installs_itself_and_captures(deployment: Deployment) -> None:
    conf = json.loads((deployment.runtime.net / "10-lab.conflist").read_text())
    assert [plugin["type"] for plugin in conf["plugins"]] == ["bridge", "portmap", "sidestep-cni"]
    one, other = deployment.pod("one"), deployment.pod("other")
    assert one.get(other.ip) == "other"
    assert one.envoy.next_connection().listener == "outbound"
    assert other.envoy.next_connection().listener == "inbound"


def test_it_finds_the_cgroup_of_kubelet_by_itself(deployment: Deployment) -> None:
    status = json.loads(deployment.sidestep("status", "--output", "json").stdout)
    assert status["attach_point"] == "/sys/fs/cgroup/kubepods"


def test_it_hears_of_pods_and_tells_of_them_by_the_api_server(deployment: Deployment) -> None:
    assert deployment.api.watchers == 1
    assert deployment.api.refused == {}
    with pytest.raises(Refused, match='excludeOutboundPorts: "80-90"'):
        deployment.pod("wrong", {"traffic.sidecar.istio.io/excludeOutboundPorts": "80-90"})
    told = ("CaptureRefused", "wrong")
    wait_until(
        lambda: told in {(each["reason"], each["involvedObject"]["name"]) for each in deployment.api.events},
        "the Event",
        10,
    )


def test_it_may_do_what_a_transparent_proxy_needs(deployment: Deployment) -> None:
    pod = CriPod(deployment.runtime, "tproxy", True, {"sidecar.istio.io/interceptionMode": "TPROXY"})
    pod.create_sandbox()
    mark = ["nsenter", f"--net={pod.netns}", "cat", "/proc/sys/net/ipv4/tcp_fwmark_accept"]
    assert subprocess.run(mark, capture_output=True, text=True, check=True).stdout == "1\n"


def test_metrics_are_served(deployment: Deployment) -> None:
    ask = ["nsenter", f"--net={deployment.node.netns}", "curl", "-s", "http://127.0.0.1:15014/metrics"]
    text = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert "istio_cni_install_ready 1.0" in text
    assert "sidestep_attached 1.0" in text


def test_operators_can_look_from_within(deployment: Deployment) -> None:
    def status() -> Any:
        done = deployment.sidestep("status", "--output", "json")
        return json.loads(done.stdout) if done.stdout else done.stderr.decode()  # exit 1: a pod has no proxy

    def accelerated() -> bool:
        told = deployment.sidestep("accelerate", "proxy", "--output", "json")
        return bool(told.exit_code == 0 and json.loads(told.stdout)["level"] == "proxy")

    assert status()["acceleration"]["level"] == "off"
    # the self-test needs a cgroup, namespaces and programs of its own: all of that is allowed in there
    wait_until(accelerated, "the self-test to allow level proxy", 30)
    assert status()["attached"]
    assert status()["pods_with_strays"] == []
    assert all(each["processes"]["captured"] for each in status()["pods"])
    for command in (
        ("pods",),
        ("maps", "pods"),
        ("trace", "--seconds", "0.5"),
        ("explain", "one", f"{deployment.pod('tried').ip}:8080", "--try", "--uid", "1000", "--gid", "1000"),
        ("deny",),
        ("report", "--seconds", "0.2"),
    ):
        done = deployment.sidestep(*command)
        assert done.exit_code == 0, (command, done.stderr.decode())
        if command[0] == "trace":
            assert done.stderr.decode().startswith("tracing\ntraced: ")


def test_a_probe_within_tries_connections_and_ends(deployment: Deployment) -> None:
    """The agent's container may act as the proxy, but may send it no signal."""
    done = deployment.sidestep("probe", "--output", "json")
    rows = {each["what"]: each["verdict"] for each in json.loads(done.stdout)["rows"]}
    tried = [what for what in rows if what.startswith(("an outbound connection", "an inbound connection"))]
    assert [rows[what] for what in tried] == ["yes"] * 4, rows


def test_its_root_is_read_only(deployment: Deployment) -> None:
    request = cri.ExecSyncRequest(
        container_id=deployment.container, cmd=["/bin/sh", "-c", "echo x > /opt/x"], timeout=5
    )
    assert "Read-only file system" in deployment.runtime.stub.ExecSync(request, timeout=10).stderr.decode()


def test_uninstall_beside_a_running_agent_is_refused_and_changes_nothing(deployment: Deployment) -> None:
    done = deployment.sidestep("uninstall")
    assert done.exit_code == 1
    assert "an agent serves" in done.stderr.decode()
    assert (deployment.runtime.bin / "sidestep-cni").exists()
    assert Path(deployment.node.bpffs / "sidestep").exists()


def test_the_sbom_lists_what_is_in_the_image() -> None:
    document = json.loads(SBOM.read_text())
    assert document["name"] == "sidestep"
    assert SBOM.stat().st_mtime >= ARCHIVE.stat().st_mtime
    packages = {
        reference["referenceLocator"].partition("?")[0]
        for package in document["packages"]
        for reference in package.get("externalRefs", [])
        if reference["referenceType"] == "purl"
    }
    locked = re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / "locks" / "run.txt").read_text(), re.M)
    assert {f"pkg:pypi/{name}@{version}" for name, version in locked} <= packages
    debian = {each.rpartition("/")[2].partition("@")[0] for each in packages if each.startswith("pkg:deb/debian/")}
    # what is installed, and what is linked into the plugin
    assert {"libbpf1", "libc6", "python3.11-minimal", "python3-bpfcc"} | {"libc6-dev", "libjansson-dev"} <= debian


def test_the_image_says_its_version() -> None:
    with tarfile.open(ARCHIVE) as archive:

        def blob(digest: str) -> Any:
            member = archive.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert member is not None
            return json.load(member)

        index = archive.extractfile("index.json")
        assert index is not None
        (manifest,) = json.load(index)["manifests"]
        config = blob(blob(manifest["digest"])["config"]["digest"])
    assert config["config"]["Labels"]["org.opencontainers.image.version"] == VERSION
