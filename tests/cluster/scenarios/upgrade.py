"""Another version of sidestep under load: with other programs, with maps of another layout, and back."""

from collections.abc import Iterator
from functools import partial

from tests.cluster.bed import Bed
from tests.cluster.changed_image import Change, change_image
from tests.cluster.checks import Check, at_once, equals
from tests.cluster.load.load import load_on
from tests.cluster.newcomers import enrolled_after
from tests.cluster.sidestep import IMAGE

_CONTAINER = "install-cni"
_OTHER = "localhost/sidestep:other-layout"
CHANGE = Change("bpf/maps.h", "#define MAX_ADDRESSES 131072", "#define MAX_ADDRESSES 262144")
_LEFT_OUT = "caller"  # an extra, so programs without it are others


def checks(bed: Bed) -> Iterator[Check]:
    """No request fails, each node has one layout and the programs of its agent, and new pods are enrolled."""
    archive = bed.cluster.directory / "other-layout.tar"
    change_image(IMAGE, archive, _OTHER, CHANGE)
    bed.cluster.import_images([archive])
    before = [_pins(bed, node.name) for node in bed.cluster.nodes]
    was = bed.sidestep.spec()
    with load_on(bed) as load:
        try:
            other_programs = partial(bed.sidestep.change, "env", f"SIDESTEP_LACKING={_LEFT_OUT}")
            yield load.during("agents with other programs", other_programs)
            yield from _of_nodes(bed, lacking=[_LEFT_OUT])
            yield Check("the layout of the maps is the same", equals(partial(_all_pins, bed), before))
            yield from enrolled_after(bed, "other programs")
            other_layout = partial(bed.sidestep.change, "image", f"{_CONTAINER}={_OTHER}")
            yield load.during("agents with maps of another layout", other_layout)
            yield from _of_nodes(bed, lacking=[_LEFT_OUT])
            yield Check("the layout of the maps is another", partial(_same_as, bed, before))
            yield from enrolled_after(bed, "another layout")
        finally:
            back = load.during("agents as they were before", partial(bed.sidestep.put, template=was["template"]))
        yield back
        yield from _of_nodes(bed, lacking=[])
        yield Check("the layout of the maps is as before", equals(partial(_all_pins, bed), before))
        yield from enrolled_after(bed, "going back")


def _of_nodes(bed: Bed, lacking: list[str]) -> list[Check]:
    """The programs that are attached are those of the agent's version, and no other version's are."""
    wanted = {"attached": True, "current": True, "lacking": lacking, "kept_by_others": {}, "open_pods": []}
    return at_once(
        Check(f"only {node.name}'s own programs are attached", equals(partial(_status, bed, node.name), wanted))
        for node in bed.cluster.nodes
    )


def _status(bed: Bed, node: str) -> dict[str, object]:
    told = bed.sidestep.status(node)
    return {
        **{key: told[key] for key in ("attached", "current", "kept_by_others", "open_pods")},
        "lacking": list(told["lacking"]),
    }


def _pins(bed: Bed, node: str) -> str:
    return str(bed.sidestep.status(node)["pins"])


def _all_pins(bed: Bed) -> list[str]:
    return [_pins(bed, node.name) for node in bed.cluster.nodes]


def _same_as(bed: Bed, before: list[str]) -> str:
    """The nodes whose pins are where they were."""
    return ", ".join(now for now, then in zip(_all_pins(bed), before, strict=True) if now == then)
