"""What several unit tests share: the plugin, made from the sources as they are, and a world with an API server."""

import fcntl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.cluster import World

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as running:
        yield World(tmp_path, running)


@pytest.fixture(scope="session")
def shim() -> Path:
    """The binary; workers of one run take turns to look whether it is up to date."""
    build = REPOSITORY / "build"
    build.mkdir(exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-C", REPOSITORY / "cni" / "shim"], check=True)
    return build / "sidestep-cni"
