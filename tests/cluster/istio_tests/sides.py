"""Who captures: Istio's plugin or sidestep, each by its own chart, which take the same values."""

from collections.abc import Callable, Mapping

from tests.cluster.bed import Bed
from tests.cluster.istio_cni import IstioCni
from tests.cluster.mesh import NAMESPACE
from tests.cluster.release import Release

Side = Callable[[Bed, Mapping[str, str]], None]


def istio_cni(bed: Bed, values: Mapping[str, str]) -> None:
    """Ready on every node afterwards."""
    _make_namespace(bed)
    istio = IstioCni(bed.cluster)
    istio.import_image()
    istio.install(*_sets(values))


def sidestep(bed: Bed, values: Mapping[str, str]) -> None:
    """The same."""
    _make_namespace(bed)
    Release(bed).install(*(word for each in _sets(values) for word in ("--set", each)))


# the first is what the other is held against
SIDES: Mapping[str, Side] = {"istio-cni": istio_cni, "sidestep": sidestep}


def _make_namespace(bed: Bed) -> None:
    bed.control.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})


def _sets(values: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]
