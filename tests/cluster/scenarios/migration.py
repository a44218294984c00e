"""From sidestep's own DaemonSet to Istio's chart and back, as docs/migration.md says, under load."""

from collections.abc import Iterator
from functools import partial

from tests.cluster.bed import Bed
from tests.cluster.capturers import RULES, SIDESTEP, captured_by
from tests.cluster.checks import Check
from tests.cluster.istio_cni import IstioCni
from tests.cluster.load.load import FAR, LOAD, NEAR, load_on
from tests.cluster.newcomers import enrolled_after
from tests.cluster.pods import PodName


def _exchange(bed: Bed, command: str) -> None:
    for node in bed.cluster.nodes:
        bed.sidestep.ask(node.name, command, "--all")


def checks(bed: Bed) -> Iterator[Check]:
    """No request fails, whoever captured the load's pods; new pods belong to whoever is there."""
    istio = IstioCni(bed.cluster)
    istio.import_image()
    made: list[PodName] = []
    try:
        with load_on(bed) as load:
            yield load.during("sidestep goes, with its pods captured", bed.sidestep.remove)
            yield load.during("istio-cni comes", istio.install)
        made = bed.make_on_each("migrated")
        yield from captured_by(bed, made, RULES)
        with load_on(bed) as load:
            yield load.during("istio-cni goes, with Istio's rules in its pods", istio.uninstall)
            yield load.during("sidestep comes", bed.sidestep.apply)
            yield from enrolled_after(bed, "migration")
            yield load.during("running pods go from Istio's rules to sidestep", partial(_exchange, bed, "takeover"))
            yield from captured_by(bed, [*made, LOAD, NEAR, FAR], SIDESTEP)
            yield load.during("they go back to Istio's rules", partial(_exchange, bed, "giveback"))
            yield from captured_by(bed, [*made, LOAD, NEAR, FAR], RULES)
            yield load.during("sidestep goes again", bed.sidestep.remove)
            yield load.during("istio-cni comes again", istio.install)
        yield from captured_by(bed, made, RULES)
    finally:
        bed.pods.delete(*made)
        istio.uninstall()
        bed.sidestep.apply()
