"""Who captures: Istio's plugin or sidestep, each by its own chart, which take the same values."""

from collections.abc import Callable, Mapping

from tests.cluster.bed import Bed
from tests.cluster.istio_cni import IstioCni
from tests.cluster.mesh import NAMESPACE
from tests.cluster.release import Release
from tests.cluster.sets import sets

Side = Callable[[Bed, Mapping[str, str]], None]


def istio_cni(bed: Bed, values: Mapping[str, str]) -> None:
    """Ready on every node afterwards."""
    bed.control.make_namespace(NAMESPACE)
    istio = IstioCni(bed.cluster)
    istio.import_image()
    istio.install(*_named(values))


def sidestep(bed: Bed, values: Mapping[str, str]) -> None:
    """The same."""
    bed.control.make_namespace(NAMESPACE)
    Release(bed).install(*sets(_named(values)))


# the first is what the other is held against
SIDES: Mapping[str, Side] = {"istio-cni": istio_cni, "sidestep": sidestep}


def _named(values: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]
