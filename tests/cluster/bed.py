"""What a scenario is given: a cluster that is up, with Istio and sidestep in it, and five pods that answer."""

from dataclasses import dataclass

from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.mesh import Mesh
from tests.cluster.pods import PodName, Pods
from tests.cluster.sidestep import IMAGE, Sidestep
from tests.lab import images
from tests.lab.node import REPOSITORY

NAMESPACE = "mesh"
# CLIENT and NEAR are on one node, FAR is on the other
CLIENT, NEAR, FAR = PodName(NAMESPACE, "client"), PodName(NAMESPACE, "near"), PodName(NAMESPACE, "far")
# these have no sidecars; the first is beside CLIENT, the second beside FAR
PLAIN = (PodName("plain", "one"), PodName("plain", "two"))


@dataclass(frozen=True)
class Bed:
    """The parts of one cluster."""

    cluster: Cluster
    sidestep: Sidestep
    mesh: Mesh
    pods: Pods

    @classmethod
    def of(cls, cluster: Cluster) -> "Bed":
        """For a cluster whose hosts have been booted; nothing runs on them yet."""
        return cls(cluster, Sidestep(cluster), Mesh(cluster), Pods(cluster.control))

    def start_nodes(self) -> None:
        """Both are Ready afterwards, and have the images of what runs in pods."""
        self.cluster.start([*images.make_images(REPOSITORY / "build" / "images"), IMAGE])

    @property
    def control(self) -> ControlPlane:
        """Who is asked about everything."""
        return self.cluster.control

    def releases(self) -> list[str]:
        """Of what runs on the nodes, as each says itself; a line each, one if they are alike."""
        infos = [node["status"]["nodeInfo"] for node in self.control.get("nodes")]
        names = ("kubeletVersion", "containerRuntimeVersion", "kernelVersion")
        return sorted({"kubelet {}, {}, Linux {}".format(*(info[name] for name in names)) for info in infos})

    def make_pods(self) -> None:
        """Two without sidecars and three with, of which two are on one node."""
        self.control.make_namespace(PLAIN[0].namespace)
        self.mesh.make_namespace(NAMESPACE)
        here, there = self.cluster.nodes
        places = {PLAIN[0]: here, PLAIN[1]: there, CLIENT: here, NEAR: here, FAR: there}
        for pod, node in places.items():
            self.pods.make(pod, node.name)
        self.pods.wait_until_ready(*places)

    def make_on_each(self, name: str) -> list[PodName]:
        """A new mesh pod on each node, by the name and a number; all are Ready."""
        pods = [PodName(NAMESPACE, f"{name}-{number}") for number, _ in enumerate(self.cluster.nodes)]
        for pod, node in zip(pods, self.cluster.nodes, strict=True):
            self.pods.make(pod, node.name)
        self.pods.wait_until_ready(*pods)
        return pods
