"""Meshes made of real parts: CNI plugins, the shim, the agent, Envoy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.lab.machine import acceleration_needed
from tests.lab.node import Node
from tests.lab.pod import Pod


@dataclass(frozen=True)
class Mesh:
    """Two mesh pods and a plain one."""

    node: Node
    alpha: Pod
    beta: Pod
    gamma: Pod


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Shared by a module's tests: they leave it as they found it."""
    with Node() as node:
        yield Mesh(node, node.pod("alpha"), node.pod("beta"), node.pod("gamma", mesh=False))


@contextmanager
def accelerated_mesh() -> Iterator[Mesh]:
    """Likewise, with pods that allow every level of acceleration; the node's is off and the tests' to set."""
    node = Node()
    node.agent.options = ["--acceleration", "off"]
    with acceleration_needed(), node:
        allowed = {"sidestep.io/acceleration": "full"}
        alpha, beta = (node.pod(name, annotations=allowed) for name in ("alpha", "beta"))
        yield Mesh(node, alpha, beta, node.pod("gamma", mesh=False))


@pytest.fixture(scope="module")
def fast_mesh() -> Iterator[Mesh]:
    """Shared by a module's tests, too."""
    with accelerated_mesh() as mesh:
        yield mesh


@pytest.fixture
def node() -> Iterator[Node]:
    """A node of the test's own, with its agent and no pods."""
    with Node() as node:
        yield node
