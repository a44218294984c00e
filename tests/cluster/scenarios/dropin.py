"""sidestep's image in Istio's own DaemonSet, from Istio's unmodified chart: one value there, and back again."""

from collections.abc import Iterator
from functools import partial

from tests.cluster.bed import CLIENT, NEAR, Bed
from tests.cluster.capturers import RULES, SIDESTEP, captured_by
from tests.cluster.checks import Check, answered_by, at_once, equals, soon
from tests.cluster.istio_cni import IstioCni
from tests.cluster.istioctl import WITH_PLUGIN, Istioctl, with_image
from tests.cluster.pods import PodName
from tests.cluster.sidestep import IMAGE_NAME

OURS = f"image={IMAGE_NAME}"
_PRIMARY = ["bridge", "portmap"]
_FINE = {"attached": True, "problem": "", "open_pods": [], "pods_with_strays": []}


def checks(bed: Bed) -> Iterator[Check]:
    """From istio-cni to sidestep and back, twice; pods of each time go on beside those of the others."""
    istio = IstioCni(bed.cluster)
    made: list[PodName] = []
    by_istioctl = partial(Istioctl(bed.cluster).image, WITH_PLUGIN, with_image(IMAGE_NAME))
    yield Check("istioctl takes the image by the same value", equals(by_istioctl, IMAGE_NAME))
    bed.sidestep.remove()
    try:
        istio.import_image()
        for who, values, name in (
            (RULES, (), "ruled"),
            (SIDESTEP, (OURS,), "dropped-in"),
            (RULES, (), "ruled-again"),
            (SIDESTEP, (OURS,), "again"),
        ):
            istio.install(*values)
            yield from _chains(bed, [*_PRIMARY, "istio-cni" if who == RULES else "sidestep-cni"])
            fresh = bed.make_on_each(name)
            made += fresh
            yield from captured_by(bed, fresh, who)
            yield from at_once(_answers(bed, made))
            if who == SIDESTEP:
                yield from at_once(_agents(bed))
        for pods, who in ((made[0:2], RULES), (made[2:4], SIDESTEP), (made[4:6], RULES)):
            yield from captured_by(bed, pods, who)
    finally:
        bed.pods.delete(*made)
        istio.uninstall()
        left = [node.plugins() for node in bed.cluster.nodes]
        bed.sidestep.apply()
    yield Check("uninstalled, it leaves each chain as it was", equals(lambda: left, [_PRIMARY] * len(left)))


def _chains(bed: Bed, wanted: list[str]) -> Iterator[Check]:
    for node in bed.cluster.nodes:
        yield Check(f"the chain of {node.name} is {', '.join(wanted)}", equals(node.plugins, wanted))


def _answers(bed: Bed, pods: list[PodName]) -> Iterator[Check]:
    """With mTLS from and to pods of the bed, which sidestep captured before all that."""
    for pod in pods:
        to = answered_by(bed.pods, CLIENT, pod.host, pod, f"By={pod.spiffe}", f"URI={CLIENT.spiffe}")
        back = answered_by(bed.pods, pod, NEAR.host, NEAR, f"By={NEAR.spiffe}", f"URI={pod.spiffe}")
        yield Check(f"{CLIENT} and {pod} talk mTLS", soon(to))
        yield Check(f"{pod} and {NEAR} talk mTLS", soon(back))


def _agents(bed: Bed) -> Iterator[Check]:
    for node in bed.cluster.nodes:
        yield Check(f"status on {node.name} finds nothing wrong", equals(partial(_status, bed, node.name), _FINE))


def _status(bed: Bed, node: str) -> dict[str, object]:
    told = bed.sidestep.status(node)
    return {key: told[key] for key in _FINE}
