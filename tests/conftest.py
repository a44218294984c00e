"""Tests that need the kernel fail where it cannot load the programs; SIDESTEP_ALLOW_SKIP=1 skips and counts them."""

import fcntl
import os
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from bpf import kept
from bpf.attachment import attach_programs, detach_programs
from bpf.errors import SidestepError
from bpf.kernel import cgroup2_root
from bpf.pins import Pins

# the same examples every time: a run says something about the change, not about luck; more with HYPOTHESIS_EXAMPLES
settings.register_profile(
    "sidestep", derandomize=True, deadline=None, max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "200"))
)
settings.load_profile("sidestep")

# a shell that runs something in the background has it ignore SIGINT, and with it all that the tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
# The programs are compiled once for all workers and runs. Tests about compiling have a directory of their own.
os.environ.setdefault(kept.VARIABLE, str(REPOSITORY / "build" / "bytecode"))
_ALLOWED = os.environ.get("SIDESTEP_ALLOW_SKIP") == "1"
# Begun first, so that no worker is left with one of them when the others have ended.
_LONGEST = (
    "e2e/test_moments.py",
    "e2e/test_life.py",
    "node/test_conformance.py",
    "node/test_conformance_ambient.py",
    "datapath/test_probe.py",
    "node/test_backpressure.py",
    "e2e/test_image.py",
    "node/test_takeover.py",
    "node/test_transfers.py",
    "node/test_trace.py",
    "node/test_deny.py",
    "node/test_bench.py",
    "node/test_explain.py",
    "datapath/test_reconcile.py",
    "node/test_maps.py",
    "node/test_adoption.py",
    "datapath/test_port_space.py",
    "datapath/test_attachment.py",
)
_NEEDS_KERNEL = {"datapath", "node", "e2e"}


@cache
def _why_not() -> str:
    """Why this kernel cannot run the programs; empty when it can."""
    if os.geteuid() != 0:
        return "not root"
    bpffs = Path(tempfile.mkdtemp(prefix="sidestep-probe-"))
    cgroup = cgroup2_root() / bpffs.name
    try:
        subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True, capture_output=True)
        cgroup.mkdir()
        attach_programs(Pins(bpffs), cgroup)
        detach_programs(Pins(bpffs))
    except (SidestepError, OSError, subprocess.CalledProcessError) as error:
        return str(error).splitlines()[0]
    finally:
        if cgroup.exists():
            cgroup.rmdir()
        subprocess.run(["umount", bpffs], capture_output=True)
        bpffs.rmdir()
    return ""


@pytest.fixture(scope="session")
def shim() -> Path:
    """The plugin, made from the sources as they are; workers of one run take turns to look whether it is up to date."""
    build = REPOSITORY / "build"
    build.mkdir(exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "--no-print-directory", "-C", REPOSITORY / "cni" / "shim"], check=True)
    return build / "sidestep-cni"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {REPOSITORY / "tests" / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if not _ALLOWED:
        return
    for item in items:
        if _NEEDS_KERNEL & set(item.path.parts) and _why_not():
            item.add_marker(pytest.mark.skip(reason=f"SIDESTEP_ALLOW_SKIP: {_why_not()}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if "SIDESTEP_ALLOW_SKIP" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests that need the kernel were SKIPPED: {_why_not()}", yellow=True
        )
