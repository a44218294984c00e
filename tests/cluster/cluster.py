"""A cluster on this machine: a control plane and two nodes, each on a host of its own."""

import os
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster import cilium, shape
from tests.cluster.addresses import Place
from tests.cluster.builder import BUILD
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import ControlPlane
from tests.cluster.host import Host
from tests.cluster.inotify import lower_limit, raise_limit
from tests.cluster.kubernetes_node import KubernetesNode
from tests.cluster.wiring import connect, plug_in, route_to_pods, unplug
from tests.lab.node import identity_of

CLUSTERS = BUILD / "running"
LOGS = BUILD / "logs"  # of the daemons of the last run, a folder a cluster that was not kept
_KEPT = "kept"
CONTROL_NAME, NODE_NAMES = "control", ("node-1", "node-2")


class Cluster:
    """Use as a context manager; leaving it takes everything down, unless it is kept."""

    def __init__(self) -> None:
        """Its id is taken at once."""
        self.id = secrets.token_hex(3)
        self.directory = CLUSTERS / self.id
        self._hosts = hosts_of(self.id)

    def __enter__(self) -> "Cluster":
        self.directory.mkdir(parents=True)
        (self.directory / "owner").write_text(identity_of(os.getpid()))
        try:
            raise_limit(self.id)
            for host in self._hosts:
                host.boot()
            connect(self._hosts[0], self._hosts[1:])
            authority = Authority(self.directory / "pki")
            self.control = ControlPlane(self._hosts[0], authority)
            self.nodes = [KubernetesNode(host, authority) for host in self._hosts[1:]]
        except BaseException:
            remove(self.id)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (self.directory / "owner").read_text() == _KEPT:
            return
        for host in self._hosts:
            host.power_off()
        self._save_logs()
        remove(self.id)

    def keep(self) -> None:
        """Leave it running at the end, however that comes."""
        (self.directory / "owner").write_text(_KEPT)

    def start(self, archives: Sequence[Path]) -> None:
        """Run everything; both nodes are Ready afterwards. `archives` are the images of its pods."""
        self.control.start()
        if shape.network() == shape.CILIUM:
            for path in cilium.definitions():
                self.control.kubectl("apply", "--server-side", "-f", path)
        with ThreadPoolExecutor() as pool:
            list(pool.map(KubernetesNode.start, self.nodes))
        self.import_images(archives)
        self.control.wait("condition=Ready", *(f"node/{node.name}" for node in self.nodes))
        if shape.network() != shape.BRIDGE:  # the control plane's host is no Node, so nobody else makes its routes
            for node in self.nodes:
                ranges = self.control.get("node", node.name)["spec"]["podCIDRs"]
                route_to_pods(self.control.host, node.host, ranges)

    def import_images(self, archives: Sequence[Path]) -> None:
        """OCI layouts, on every node under the names that are in them."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.import_images(archives), self.nodes))

    def cut_power(self, node: KubernetesNode) -> None:
        """Of one node: whatever ran there is gone at once, and what was in its memory and in the kernel."""
        unplug(self.control.host, node.host)
        node.host.power_off()

    def power_on(self, node: KubernetesNode) -> None:
        """Boot a node whose power was cut, on the same disk. Its daemons run afterwards."""
        node.host.boot()
        plug_in(self.control.host, node.host, [each.host for each in self.nodes if each is not node])
        node.start_daemons()

    def _save_logs(self) -> None:
        run = f"{os.getpid()}-"
        for folder in LOGS.glob("*") if LOGS.exists() else ():
            if not folder.name.startswith(run):
                shutil.rmtree(folder, ignore_errors=True)
        for log in self.directory.glob("*/*.log"):
            folder = LOGS / f"{run}{self.id}" / log.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            log.rename(folder / log.name)


def is_ready(thing: dict[str, Any]) -> bool:
    """Whether a Node or a Pod says so."""
    conditions = thing["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def hosts_of(cluster: str) -> list[Host]:
    """The control plane's and the nodes'."""
    names = (CONTROL_NAME, *NODE_NAMES)
    return [Host(cluster, name, Place(number), CLUSTERS / cluster / name) for number, name in enumerate(names)]


def abandoned() -> list[str]:
    """Clusters that were kept, or that no living process has made."""
    found = []
    for directory in CLUSTERS.iterdir() if CLUSTERS.exists() else ():
        with suppress(FileNotFoundError):  # not written yet, or just removed
            owner = (directory / "owner").read_text()
            if owner == _KEPT or owner != identity_of(int(owner.split()[0])):
                found.append(directory.name)
    return found


def remove(cluster: str) -> None:
    """Take down everything of a cluster, in whatever state it is."""
    for host in hosts_of(cluster):
        host.power_off()
    lower_limit(cluster)
    shutil.rmtree(CLUSTERS / cluster)
