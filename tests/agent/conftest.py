"""What runs without BPF but is no unit: it waits, serves, needs root, or has another program look at what we make."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from installer.host import watching
from tests.agent.cni_host import Host
from tests.lab.cluster import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """An API server, and the agent's side of it."""
    with ExitStack() as running:
        yield World(tmp_path, running)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Its installer hears of a change, or never finds it: the regular look is an hour away."""
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 3600.0)
    made = Host(tmp_path)
    yield made
    made.stop()
