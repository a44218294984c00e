"""A pod whose annotations are as large as the API server allows: no other pod's ADD waits for its rules."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bpf.pins import Pins
from bpf.tables import Tables
from cni.policy import annotations
from tests.lab.node import Node
from tests.lab.sandboxes import PREVIOUS, Sandboxes
from tests.lab.waiting import wait_until

PORTS = 20_000
RANGES = 9_000
_LIMIT = 256 << 10  # bytes of all annotations of an object (TotalAnnotationSizeLimitB of apimachinery)
HUGE = {
    annotations.EXCLUDE_OUTBOUND_PORTS: ",".join(map(str, range(1, PORTS + 1))),
    annotations.EXCLUDE_OUTBOUND_RANGES: ",".join(f"11.{n >> 8}.{n & 255}.0/24" for n in range(RANGES)),
}


@pytest.fixture
def sandboxes(node: Node) -> Iterator[Sandboxes]:
    made = Sandboxes(node, 2)
    yield made
    made.remove()


def rules(node: Node) -> tuple[int, int]:
    with Tables(Pins(node.bpffs)) as tables:
        return tables.port_rules.count(), tables.networks.count()


def test_an_add_does_not_wait_for_a_huge_policy(node: Node, sandboxes: Sandboxes) -> None:
    assert sum(map(len, HUGE.values())) < _LIMIT
    sandboxes.manifest("huge", **HUGE)
    with ThreadPoolExecutor(1) as runtime:
        huge = runtime.submit(sandboxes.run, "ADD", sandboxes.attachment(0, "huge"))
        wait_until(lambda: any(rules(node)), "the agent to write the huge pod's rules")
        assert sandboxes.run("ADD", sandboxes.attachment(1)) == PREVIOUS
        assert not huge.done()
        assert huge.result() == PREVIOUS
    ports, ranges = rules(node)
    assert ports >= PORTS
    assert ranges == RANGES
