"""What several unit tests need: the plugin, made from the sources as they are."""

import fcntl
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shim() -> Path:
    """The binary; workers of one run take turns to look whether it is up to date."""
    build = REPOSITORY / "build"
    build.mkdir(exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-C", REPOSITORY / "cni" / "shim"], check=True)
    return build / "sidestep-cni"
