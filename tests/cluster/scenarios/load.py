"""Requests without a pause while nothing happens: that the load itself is right, and that all of it is captured."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.cluster.bed import Bed
from tests.cluster.checks import Check
from tests.cluster.load.load import FAR, LOAD, NEAR, Load, load_on
from tests.cluster.pods import PodName

_REQUESTS = 20  # of each flow


def checks(bed: Bed) -> Iterator[Check]:
    """HTTP and plain TCP, on one node and across nodes, by Service and by Pod IP."""
    here, there = (node.name for node in bed.cluster.nodes)
    with load_on(bed) as load:
        yield load.during("nothing happens", partial(load.wait_for_more, _REQUESTS))
        yield Check(f"each connection of {LOAD} is captured", partial(_let_pass, bed, here, load))
        for pod, node in ((LOAD, here), (NEAR, here), (FAR, there)):
            yield Check(f"no connection of {pod} is refused or lost", partial(_lost, bed, node, pod))


def _let_pass(bed: Bed, node: str, load: Load) -> str:
    """How many of the client's connections were not captured; its proxy's own are none of them."""
    opened = load.opened()
    captured = bed.sidestep.ask_json(node, "pods", str(LOAD))["connections"]["outbound"]["captured"]
    return f"{captured} of {opened}" if captured < opened else ""


def _lost(bed: Bed, node: str, pod: PodName) -> str:
    told: dict[str, Any] = bed.sidestep.ask_json(node, "pods", str(pod))
    counts = {f"{way} {verdict}": n for way, of in told["connections"].items() for verdict, n in of.items()}
    counts["lost"] = told["lost_handovers"]
    kinds = ("refused", "denied", "unreachable", "lost")
    return ", ".join(f"{name}: {count}" for name, count in counts.items() if count and name.endswith(kinds))
