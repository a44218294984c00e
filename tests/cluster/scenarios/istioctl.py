"""sidestep's image by istioctl: one value in its line, and back by leaving the value out."""

from collections.abc import Iterator

from tests.cluster.bed import Bed
from tests.cluster.capturers import RULES, SIDESTEP, captured_by
from tests.cluster.checks import Check, equals
from tests.cluster.istio_cni import IstioCni
from tests.cluster.istioctl import WITH_PLUGIN, WITHOUT_PLUGIN, Istioctl, with_image
from tests.cluster.newcomers import talking
from tests.cluster.pods import PodName
from tests.cluster.sidestep import IMAGE_NAME

_OURS = (with_image(IMAGE_NAME),)


def checks(bed: Bed) -> Iterator[Check]:
    """New pods belong to whoever istioctl has installed."""
    istioctl = Istioctl(bed.cluster)
    made: list[PodName] = []
    bed.sidestep.remove()
    try:
        IstioCni(bed.cluster).import_image()
        for values, who, plugin in ((_OURS, SIDESTEP, "sidestep-cni"), ((), RULES, "istio-cni")):
            istioctl.install(WITH_PLUGIN, *values)
            for node in bed.cluster.nodes:
                chain = ["bridge", "portmap", plugin]
                yield Check(f"istioctl has put {plugin} into {node.name}'s chain", equals(node.plugins, chain))
            fresh = bed.make_on_each(f"by-istioctl-{plugin}")
            made += fresh
            yield from captured_by(bed, fresh, who)
            yield from talking(bed, fresh)
    finally:
        bed.pods.delete(*made)
        istioctl.install(WITHOUT_PLUGIN)  # takes the DaemonSet away, and would have pods get istio-init
        bed.mesh.install_charts()
        bed.sidestep.apply()
