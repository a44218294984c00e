"""Fixtures: attached programs, pods with a peer, and an agent's parts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.datapath import wires
from tests.datapath.adopting import Parts, parts
from tests.datapath.ambient import Ztunnels
from tests.datapath.wires import Kernel, Wire, fresh_kernel


@pytest.fixture(scope="session")
def kernel() -> Iterator[Kernel]:
    """Attached programs, made for this test process."""
    with fresh_kernel() as made:
        yield made


@pytest.fixture
def make_wire(kernel: Kernel) -> Iterator[Callable[[], Wire]]:
    """Makes wires whose pods all have the same addresses; everything is taken down again."""
    with ExitStack() as undo:
        yield lambda: wires.make_wire(kernel, undo)


@pytest.fixture
def wire(make_wire: Callable[[], Wire]) -> Wire:
    """One pod and its peer, not enrolled yet."""
    return make_wire()


@pytest.fixture
def way() -> str:
    """How the agent finds listeners that the programs have not seen: one of adopting.WAYS."""
    return "iterator"


@pytest.fixture
def agent(kernel: Kernel, way: str) -> Iterator[Parts]:
    """The parts of an agent that are about running pods."""
    with parts(kernel, way) as made:
        yield made


@pytest.fixture
def ztunnels(kernel: Kernel) -> Iterator[Ztunnels]:
    """Those of the node; the programs know none any more afterwards."""
    with ExitStack() as undo:
        made = Ztunnels(kernel, undo)
        undo.callback(made.forget)
        yield made
