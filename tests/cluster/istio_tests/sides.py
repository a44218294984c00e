"""Who captures: Istio's plugin by its own chart, or sidestep by its manifests, each with one mode of repair."""

from collections.abc import Callable, Mapping

from tests.cluster.bed import Bed
from tests.cluster.istio_cni import IstioCni
from tests.cluster.mesh import NAMESPACE

Side = Callable[[Bed, Mapping[str, str]], None]
_REPAIR_VARIABLES = {"repairPods": "REPAIR_REPAIR_PODS", "deletePods": "REPAIR_DELETE_PODS"}


def istio_cni(bed: Bed, repair: Mapping[str, str]) -> None:
    """`repair` are values of the chart, below `repair`."""
    bed.control.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    istio = IstioCni(bed.cluster)
    istio.import_image()
    istio.install(*(f"repair.{name}={value}" for name, value in repair.items()))


def sidestep(bed: Bed, repair: Mapping[str, str]) -> None:
    """The same, with the settings that those values are here."""
    bed.sidestep.install()
    if repair:
        bed.sidestep.change("env", *(f"{_REPAIR_VARIABLES[name]}={value}" for name, value in repair.items()))


# the first is what the other is held against
SIDES: Mapping[str, Side] = {"istio-cni": istio_cni, "sidestep": sidestep}
