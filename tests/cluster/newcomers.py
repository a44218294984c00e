"""New mesh pods: what must hold of those that start after something has happened."""

from collections.abc import Iterator
from functools import partial

from tests.cluster.bed import Bed
from tests.cluster.checks import Check, answered_by, at_once, equals, soon
from tests.cluster.pods import PodName

_HEARD_SECONDS = 120  # istiod's watches, after an outage of the API server, wait longer at each try


def enrolled_after(bed: Bed, what: str) -> Iterator[Check]:
    """One on each node: both are captured, and talk mTLS with each other. They are gone soon after."""
    pods = bed.make_on_each(f"new-{what.replace(' ', '-').lower()}")
    try:
        yield from at_once([*_captured(bed, pods), *talking(bed, pods)])
    finally:
        bed.pods.leave(*pods)


def _captured(bed: Bed, pods: list[PodName]) -> Iterator[Check]:
    for pod, node in zip(pods, bed.cluster.nodes, strict=True):
        captured = partial(bed.sidestep.captures, node.name, str(pod))
        yield Check(f"sidestep captures {pod}", equals(captured, True))


def talking(bed: Bed, pods: list[PodName]) -> Iterator[Check]:
    """The two talk mTLS, either way."""
    for client, server in (pods, reversed(pods)):
        mutual = answered_by(bed.pods, client, server.host, server, f"By={server.spiffe}", f"URI={client.spiffe}")
        yield Check(f"{client} and {server} talk mTLS", soon(mutual, _HEARD_SECONDS))
