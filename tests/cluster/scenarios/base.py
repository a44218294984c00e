"""sidestep and the mesh as they are after they were installed: who answers, and whom the proxies name."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from tests.cluster import cilium, shape
from tests.cluster.bed import CLIENT, FAR, NEAR, PLAIN, Bed
from tests.cluster.builder import BIN
from tests.cluster.checks import Check, answered_by, at_once, equals
from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubernetes_node import KubernetesNode
from tests.cluster.mesh import Mesh
from tests.cluster.pods import PodName, Pods
from tests.cluster.sidestep import Sidestep
from tests.lab.waiting import wait_until

_SECONDS = 30  # until every proxy has heard of a change


def checks(bed: Bed) -> Iterator[Check]:
    """All that must hold before anything happens."""
    found = _of_nodes(bed.cluster, bed.sidestep) + _of_plain_pods(bed.pods, PLAIN[0], PLAIN)
    yield from at_once(found + _of_sidecars(bed.control, bed.pods, bed.sidestep) + _of_layout(bed))
    yield from at_once(_of_requests(bed.pods, PLAIN[0]))
    yield from _in_strict(bed.pods, PLAIN[0], bed.mesh)


def _of_nodes(cluster: Cluster, sidestep: Sidestep) -> list[Check]:
    """sidestep as kubelet and containerd run it."""
    found = []
    for node in cluster.nodes:
        chain = [*shape.PLUGINS[shape.network()], "sidestep-cni"]
        found += [
            Check(f"the agent on {node.name} is Ready", equals(partial(sidestep.is_ready_on, node.name), True)),
            Check(f"the plugin is the last of {node.name}'s chain", equals(node.plugins, chain)),
            Check(f"status on {node.name} finds nothing wrong", equals(partial(sidestep.verdict, node.name), "OK")),
        ]
    return found


def _of_plain_pods(pods: Pods, client: PodName, servers: Iterable[PodName]) -> list[Check]:
    """Pods outside of the mesh start and are reached as if sidestep were not there."""
    found = []
    for server in servers:
        for host in (server.host, pods.ip(server)):
            found.append(Check(f"{client} reaches {server} at {host}", answered_by(pods, client, host, server)))
    return found


def _of_sidecars(control: ControlPlane, pods: Pods, sidestep: Sidestep) -> list[Check]:
    """The injector's work and sidestep's fit together."""
    found = []
    for pod in (CLIENT, NEAR, FAR):
        wanted = ["app", "istio-proxy", "istio-validation"]
        captured = partial(sidestep.captures, pods.get(pod)["spec"]["nodeName"], str(pod))
        found += [
            Check(f"{pod} has a sidecar and no istio-init", equals(partial(_containers, pods, pod), wanted)),
            Check(f"sidestep captures {pod}", equals(captured, True)),
        ]
    proxies = [pod.host for pod in (CLIENT, FAR, NEAR)]
    return [*found, Check("istiod configures every proxy", equals(partial(_configured, control), proxies))]


def _of_layout(bed: Bed) -> list[Check]:
    """That nodes are as was asked for: where the kernel has a mesh pod's application, and by which device it is far."""
    found = [Check(f"{pod}'s application is in its cgroup", partial(_misplaced, bed, pod)) for pod in (CLIENT, FAR)]
    here, there = bed.cluster.nodes
    device = "flannel.1" if shape.network() == shape.FLANNEL else "eth0"
    way = partial(_device_to, here, bed.pods.ip(FAR))
    if shape.network() == shape.CILIUM:
        balanced = equals(lambda: "cil_sock4_connect" in cilium.load_balancers(here.host), True)
        found.append(Check(f"Cilium's socket load-balancer is at the root of {here.name}'s cgroups", balanced))
    return [*found, Check(f"{here.name} reaches the pods on {there.name} by {device}", equals(way, device))]


def _device_to(node: KubernetesNode, ip: str) -> str:
    (way,) = json.loads(node.host.run(["ip", "-j", "route", "get", ip]))
    return str(way["dev"])


def _misplaced(bed: Bed, pod: PodName) -> str:
    """Where its application is instead."""
    found = bed.pods.get(pod)
    node = next(each for each in bed.cluster.nodes if each.name == found["spec"]["nodeName"])
    status = found["status"]
    container = next(each["containerID"] for each in status["containerStatuses"] if each["name"] == "app")
    container = container.removeprefix("containerd://")
    wanted = shape.cgroup_of(found["metadata"]["uid"], status["qosClass"], container)
    (own,) = [line for line in node.cgroups_of(container) if line.startswith("0::")]
    mounts = node.host.run(["cat", "/proc/self/mountinfo"]).splitlines()
    kinds = {line.split(" - ")[1].split()[0] for line in mounts} & {"cgroup", "cgroup2"}
    layout = shape.HYBRID if "cgroup" in kinds else shape.PURE
    return "" if (own, layout) == (f"0::{wanted}", shape.cgroups()) else f"{own} in a {layout} layout"


def _of_requests(pods: Pods, plain: PodName) -> list[Check]:
    """mTLS by name on one node and between two, and requests without a proxy."""
    found = []
    for server in (NEAR, FAR):
        found += [
            Check(f"{CLIENT} and {server} talk mTLS", _mutual(pods, server)),
            Check(f"{CLIENT} reaches {server} by its Pod IP", answered_by(pods, CLIENT, pods.ip(server), server)),
            Check(f"{plain} reaches {server} without mTLS", answered_by(pods, plain, server.host, server)),
        ]
    return found


def _in_strict(pods: Pods, plain: PodName, mesh: Mesh) -> Iterator[Check]:
    """What STRICT makes of that."""
    yield _in_mode(mesh, "STRICT", lambda: _refuses(pods, plain, NEAR) and _refuses(pods, plain, FAR))
    found = []
    for server in (NEAR, FAR):
        refused = equals(partial(_refuses, pods, plain, server), True)
        found += [
            Check(f"{server} refuses {plain} in STRICT", refused),
            Check(f"{CLIENT} and {server} talk mTLS in STRICT", _mutual(pods, server)),
        ]
    yield from at_once(found)
    yield _in_mode(mesh, "PERMISSIVE", lambda: pods.ask(plain, NEAR.host).server == NEAR.name)


def _mutual(pods: Pods, server: PodName) -> Callable[[], str]:
    return answered_by(pods, CLIENT, server.host, server, f"By={server.spiffe}", f"URI={CLIENT.spiffe}")


def _refuses(pods: Pods, client: PodName, server: PodName) -> bool:
    """As Envoy refuses bytes that begin no TLS."""
    return "Connection reset by peer" in pods.ask(client, server.host).error


def _in_mode(mesh: Mesh, mode: str, heard: Callable[[], bool]) -> Check:
    def look() -> str:
        mesh.require(mode)
        wait_until(heard, f"the proxies to hear of {mode}", _SECONDS)
        return ""

    return Check(f"the proxies hear of {mode}", look)


def _containers(pods: Pods, pod: PodName) -> list[str]:
    spec = pods.get(pod)["spec"]
    return sorted(each["name"] for each in spec["initContainers"] + spec["containers"])


def _configured(control: ControlPlane) -> list[str]:
    """The proxies that take their configuration from istiod, as `istioctl proxy-status` lists them."""
    table = control.host.run([BIN / "istioctl", f"--kubeconfig={control.kubeconfig}", "proxy-status"])
    return sorted(line.split()[0] for line in table.splitlines()[1:] if "CDS,LDS,EDS,RDS" in line)
