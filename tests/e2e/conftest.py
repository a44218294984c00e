"""The node that the tests of a module share, once with each layout of cgroups."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bpf.kernel import cgroup2_root, mounts
from tests.e2e.cluster import Cluster
from tests.lab.cri import CriPod
from tests.lab.leftovers import outside
from tests.lab.node import NETNS


@pytest.fixture(scope="module", params=["hybrid", "pure"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with ExitStack() as running:
        made = Cluster(request.param, running)
        yield made
        node, elsewhere = made.node, outside(made.node.directory)
    assert elsewhere
    assert [path for path in elsewhere if path.exists()] == []
    assert [mount.path for mount in mounts() if mount.path.is_relative_to(node.directory)] == []
    # in a walk that goes on where other tests take their cgroups away meanwhile
    assert [top for top, below, _ in os.walk(cgroup2_root().parent) if node.cgroup.name in below] == []
    assert list(NETNS.glob(f"sidestep-{node.id}-*")) == []
    assert not node.directory.exists()


@pytest.fixture(scope="module")
def first(cluster: Cluster) -> CriPod:
    """In the mesh from the beginning to the end."""
    return cluster.pod("first")
