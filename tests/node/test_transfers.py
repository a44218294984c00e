"""The agent is killed, replaced, or takes everything away while streams flow: nothing is lost and nothing hangs."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bpf.layout import LEVELS
from tests.lab.levels import redirected_bytes, start_agent
from tests.lab.node import REPOSITORY
from tests.lab.traffic.program import Load, calling, serving
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

# Long enough to be there before, meanwhile and after; new connections are made all the while.
LOAD = Load(seconds=4, parallel=16, mean=20_000_000, seed=5)


@pytest.fixture(params=[level for level in LEVELS if level != "off"])
def level(request: pytest.FixtureRequest, fast_mesh: Mesh) -> str:
    """One that the node is brought to, by its agent."""
    fast_mesh.node.agent.terminate()
    start_agent(fast_mesh.node, request.param)
    return str(request.param)


@contextmanager
def streaming(mesh: Mesh) -> Iterator[None]:
    """Every connection made before, meanwhile and shortly after must come to its end with all its bytes."""
    with serving(mesh.beta) as server, calling(mesh.alpha, mesh.beta.ip4, LOAD) as client:
        assert_redirecting(mesh)
        yield
        asked, answered = client.finish(), server.finish()
    assert (asked.sent, asked.received) == (answered.received, answered.sent)
    assert asked.finished == answered.finished > LOAD.parallel


def assert_redirecting(mesh: Mesh) -> None:
    """Now, not only before."""
    before = redirected_bytes(mesh.alpha)
    wait_until(lambda: redirected_bytes(mesh.alpha) > before, "data to be redirected")


def changed_sources(directory: Path) -> Path:
    """A source tree whose programs differ in a constant."""
    for package in ("bpf", "cni", "installer"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    message = directory / "bpf" / "message.c"
    text = message.read_text()
    assert text.count("(512 * 1024)") == 1
    message.write_text(text.replace("(512 * 1024)", "(256 * 1024)"))
    return directory


def test_killing_the_agent_changes_nothing(fast_mesh: Mesh, level: str) -> None:
    with streaming(fast_mesh):
        fast_mesh.node.agent.kill()
        assert_redirecting(fast_mesh)
        start_agent(fast_mesh.node, level)
        assert_redirecting(fast_mesh)


def test_swapping_the_programs_loses_nothing(fast_mesh: Mesh, level: str, tmp_path: Path) -> None:
    changed, node = changed_sources(tmp_path / "changed"), fast_mesh.node
    with streaming(fast_mesh):
        node.agent.terminate()
        start_agent(node, level, changed)
        assert "programs=swapped" in node.agent.log.read_text()
        assert_redirecting(fast_mesh)


def test_lowering_and_raising_the_level_loses_nothing(fast_mesh: Mesh, level: str) -> None:
    with streaming(fast_mesh):
        for wanted in ("off", level) * 2:
            sidestep(fast_mesh, "accelerate", wanted, "--cgroup", fast_mesh.node.kubepods)
        assert_redirecting(fast_mesh)


def test_detaching_loses_nothing(fast_mesh: Mesh, level: str) -> None:
    fast_mesh.node.agent.terminate()
    with streaming(fast_mesh):
        sidestep(fast_mesh, "detach")
        assert not (fast_mesh.node.bpffs / "sidestep").exists()


def sidestep(mesh: Mesh, *arguments: str | Path) -> None:
    """The command, on this node."""
    argv = [sys.executable, "-m", "installer", *map(str, arguments), "--bpffs", str(mesh.node.bpffs)]
    subprocess.run(argv, cwd=REPOSITORY, check=True, timeout=30, stdout=subprocess.DEVNULL)
