"""A node reboots, and is drained, under load to the other one; istiod takes the taint off when sidestep is there."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.cluster.bed import CLIENT, FAR, NAMESPACE, PLAIN, Bed
from tests.cluster.checks import Check, answered_by, equals, soon
from tests.cluster.cluster import is_ready
from tests.cluster.kubernetes_node import KubernetesNode
from tests.cluster.load.load import FAR as LOAD_FAR
from tests.cluster.load.load import NEAR as LOAD_NEAR
from tests.cluster.load.load import Load, load_on
from tests.cluster.newcomers import enrolled_after
from tests.cluster.pods import SERVER
from tests.lab.waiting import wait_until

_TAINT = "cni.istio.io/not-ready"  # istiod's untaint controller takes it off
_REQUESTS = 10  # of each flow while the node is off
_WANDERER = "wanderer"
_SECONDS = 120


def checks(bed: Bed) -> Iterator[Check]:
    """No request to the other node fails; the pods of the node come back by the plugin, captured."""
    there = bed.cluster.nodes[1]
    with load_on(bed) as load:
        yield load.during(f"{there.name} is drained", partial(_drain, bed, there), LOAD_NEAR)
        yield from _of_wanderer(bed)
        early: list[str] = []
        yield load.during(f"{there.name} reboots", partial(_reboot, bed, load, there, early), LOAD_NEAR)
        yield Check(f"istiod leaves the taint until {there.name}'s agent is Ready", lambda: ", ".join(early))
        untainted = partial(_taints, bed, there)
        yield Check(f"istiod takes the taint off {there.name} then", soon(equals(untainted, [])))
        bed.pods.wait_until_ready(FAR, PLAIN[1], LOAD_FAR)
        for pod in (FAR, LOAD_FAR):
            enrolment = partial(_enrolment, bed, there, str(pod))
            yield Check(f"the plugin has enrolled {pod} again", soon(equals(enrolment, ["by the plugin"])))
        mutual = answered_by(bed.pods, CLIENT, FAR.host, FAR, f"By={FAR.spiffe}", f"URI={CLIENT.spiffe}")
        yield Check(f"{CLIENT} and {FAR} talk mTLS after the reboot", soon(mutual))
        yield from enrolled_after(bed, "reboot")


def _reboot(bed: Bed, load: Load, node: KubernetesNode, early: list[str]) -> None:
    """Returns when the agent is Ready; what istiod did before is put into `early`."""
    bed.cluster.cut_power(node)
    load.wait_for_more(_REQUESTS, LOAD_NEAR)
    bed.cluster.power_on(node)
    # until kubelet has told otherwise, the API server has the agent's pod as it was
    wait_until(lambda: not bed.sidestep.is_ready_on(node.name), "kubelet to tell of the agent", _SECONDS)
    bed.control.kubectl("taint", "node", node.name, f"{_TAINT}:NoSchedule")

    def agent_is_ready() -> bool:
        taints = _taints(bed, node)
        ready = bed.sidestep.is_ready_on(node.name)
        if not taints and not ready:
            early.append("it is gone, and the agent is not Ready")
        return ready

    wait_until(agent_is_ready, f"the agent on {node.name}", _SECONDS)


def _taints(bed: Bed, node: KubernetesNode) -> list[str]:
    spec = bed.control.get("node", node.name)["spec"]
    return [each["key"] for each in spec.get("taints", []) if each["key"] == _TAINT]


def _enrolment(bed: Bed, node: KubernetesNode, pod: str) -> list[str]:
    """How a pod came to be enrolled, as often as it is."""
    found = [each for each in bed.sidestep.enrolled(node.name) if each["pod"] == pod]
    return ["adopted" if each["is_adopted"] else "by the plugin" for each in found]


def _drain(bed: Bed, node: KubernetesNode) -> None:
    """With one pod that may go elsewhere; the others have no controller, so they stay."""
    bed.control.apply(_deployment(node.name))
    bed.control.kubectl("rollout", "status", f"deployment/{_WANDERER}", "-n", NAMESPACE, f"--timeout={_SECONDS}s")
    try:
        where = [f"--pod-selector=app={_WANDERER}", "--delete-emptydir-data", f"--timeout={_SECONDS}s"]
        bed.control.kubectl("drain", node.name, *where)
        wait_until(lambda: [is_ready(each) for each in _wanderers(bed)] == [True], "the pod to be elsewhere", _SECONDS)
    finally:
        bed.control.kubectl("uncordon", node.name)


def _of_wanderer(bed: Bed) -> Iterator[Check]:
    here, there = (node.name for node in bed.cluster.nodes)
    (pod,) = (f"{NAMESPACE}/{each['metadata']['name']}" for each in _wanderers(bed))
    yield Check(f"sidestep captures {pod} on {here}", equals(partial(bed.sidestep.captures, here, pod), True))
    left = [each["pod"] for each in bed.sidestep.enrolled(there) if _WANDERER in each["pod"]]
    yield Check(f"nothing of it is left on {there}", lambda: ", ".join(left))
    bed.control.kubectl("delete", "deployment", _WANDERER, "-n", NAMESPACE)


def _wanderers(bed: Bed) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = bed.control.get("pods", "-n", NAMESPACE, "-l", f"app={_WANDERER}")
    return [each for each in found if "deletionTimestamp" not in each["metadata"]]


def _deployment(node: str) -> dict[str, Any]:
    """Of one pod, rather on that node."""
    labels = {"app": _WANDERER}
    fits = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    rather = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": fits}]}
    spec = {"containers": [dict(SERVER)], "affinity": {"nodeAffinity": rather}, "terminationGracePeriodSeconds": 1}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": _WANDERER, "namespace": NAMESPACE},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}},
    }
