"""The self-test itself, on this kernel, with nothing kept of an earlier one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf.kernel import cgroup2_root
from installer.acceleration import selftest
from installer.acceleration.checks import CHECKS
from tests.lab.machine import acceleration_needed


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    with acceleration_needed():
        yield


def test_this_kernel_passes_and_how_long_that_takes_is_kept(tmp_path: Path) -> None:
    found = selftest.outcome(cgroup2_root(), tmp_path)
    assert found.is_good, found
    assert set(found.problems) == {check.name for check in CHECKS}
    # where cgroup2 has the memory controller, `make kernels` looks at it
    assert set(found.unseen) <= {"memory limit of a cgroup"}
    assert found.problems["edge after a short read"] == "no edge comes for bytes by TCP behind redirected ones"
    kept = json.loads((tmp_path / "selftest.json").read_text())
    assert kept["seconds"] == found.seconds > 0
    print(f"self-test: {found.seconds} s")
