"""Many mesh pods at once; and the same ones when sidestep comes to where it was not."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.cluster.bed import CLIENT, FAR, NAMESPACE, NEAR, PLAIN, Bed
from tests.cluster.checks import Check, answered_by, equals, soon
from tests.cluster.pods import PodName
from tests.lab import images

_PODS = 40
_NAME = _NAMESPACE = "crowd"
_LATE = PodName(NAMESPACE, "made-without")
_SECONDS = 180


def checks(bed: Bed) -> Iterator[Check]:
    """All start and are captured; all are adopted if an agent finds them running."""
    try:
        bed.mesh.make_namespace(_NAMESPACE)
        bed.control.apply(_deployment())
        bed.control.kubectl("rollout", "status", f"deployment/{_NAME}", "-n", _NAMESPACE, f"--timeout={_SECONDS}s")
        crowd = [str(pod) for pod in _crowd(bed)]
        yield Check(f"each of {_PODS} pods that start at once is captured", partial(_wrong, bed, crowd, adopted=False))
        yield from _adopted(bed, [*crowd, *map(str, (CLIENT, NEAR, FAR))])
    finally:
        bed.control.kubectl("delete", "namespace", _NAMESPACE, "--ignore-not-found")


def _adopted(bed: Bed, running: list[str]) -> Iterator[Check]:
    """The whole of sidestep is taken off the nodes and comes back; the pods go on meanwhile."""
    template = bed.sidestep.spec()["template"]["spec"]
    try:
        bed.sidestep.delete()
        for node in bed.cluster.nodes:
            told = partial(bed.sidestep.uninstall, node.name, template, "--end-capture")
            yield Check(f"uninstall --end-capture on {node.name} succeeds", equals(told, "Succeeded"))
        clear = answered_by(bed.pods, CLIENT, FAR.host, FAR)
        yield Check(f"without sidestep {CLIENT} and {FAR} talk without their proxies", soon(clear))
        bed.pods.make(_LATE, bed.cluster.nodes[0].name)
        bed.control.wait("jsonpath={.status.podIP}", f"pod/{_LATE.name}", f"--namespace={NAMESPACE}")
        bed.sidestep.apply()
        yield Check(
            f"each of {len(running)} running pods is adopted", soon(partial(_wrong, bed, running, adopted=True))
        )
        mutual = answered_by(bed.pods, CLIENT, FAR.host, FAR, f"By={FAR.spiffe}", f"URI={CLIENT.spiffe}")
        yield Check(f"{CLIENT} and {FAR} talk mTLS again", soon(mutual))
        bed.pods.wait_until_ready(_LATE)
        late = [str(_LATE)]
        yield Check(
            "a pod that was made without sidestep is adopted and starts", partial(_wrong, bed, late, adopted=True)
        )
        yield Check(f"{PLAIN[0]} reaches {_LATE}", soon(answered_by(bed.pods, PLAIN[0], _LATE.host, _LATE)))
    finally:
        bed.sidestep.apply()
        bed.pods.delete(_LATE)


def _crowd(bed: Bed) -> list[PodName]:
    found = bed.control.get("pods", "-n", _NAMESPACE, "-l", f"app={_NAME}")
    return [PodName(_NAMESPACE, each["metadata"]["name"]) for each in found]


def _wrong(bed: Bed, wanted: list[str], adopted: bool) -> str:
    """The pods that are not enrolled as they should be."""
    found = [each for node in bed.cluster.nodes for each in bed.sidestep.enrolled(node.name)]
    right = [each["pod"] for each in found if each["steering"] == "steered" and each["is_adopted"] == adopted]
    return ", ".join(pod for pod in wanted if pod not in right)


def _deployment() -> dict[str, Any]:
    labels = {"app": _NAME}
    container = {"name": "app", "image": images.TOOLS, "command": ["sleep", "infinity"]}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 1}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": _NAME, "namespace": _NAMESPACE},
        "spec": {
            "replicas": _PODS,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
