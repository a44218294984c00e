"""The agent is killed, replaced, or takes everything away while streams flow: nothing is lost and nothing hangs."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.lab.levels import redirected_bytes, start_agent, state
from tests.lab.node import REPOSITORY
from tests.lab.traffic.program import Load, calling, serving
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh, accelerated_mesh

# Some are there before, meanwhile and after; others are made all the time, so that some are being made at every moment.
# With pauses, as agents need the processor too; until they are told to stop, which is before these seconds are over.
LONG = Load(seconds=1200, parallel=6, mean=2_000_000, pause=10_000, seed=5)
SHORT = Load(seconds=1200, parallel=2, mean=2_000, pause=1000, seed=6)
LEVEL = "full"  # every connection on the way is redirected, so what holds here does at proxy


@pytest.fixture
def full_mesh(fast_mesh: Mesh) -> Mesh:
    """Brought to its level by an agent of this source tree, whatever the test before has left."""
    fast_mesh.node.agent.terminate()
    start_agent(fast_mesh.node, LEVEL)
    return fast_mesh


@contextmanager
def streaming(mesh: Mesh) -> Iterator[None]:
    """Every connection made before, meanwhile and shortly after must come to its end with all its bytes."""
    with serving(mesh.beta) as server, ExitStack() as stack:
        clients = [stack.enter_context(calling(mesh.alpha, mesh.beta.ip4, load)) for load in (LONG, SHORT)]
        try:
            assert_redirecting(mesh)
            yield
        finally:
            ended = [each.complaint() for each in (server, *clients) if each.process.poll() is not None]
            assert not ended, ended  # before its time: more to the point than what else has failed then
        for client in clients:
            client.stop()
        asked, answered = [client.finish() for client in clients], server.finish()
    assert sum(each.sent for each in asked) == answered.received
    assert sum(each.received for each in asked) == answered.sent
    assert sum(each.finished for each in asked) == answered.finished > LONG.parallel


def assert_redirecting(mesh: Mesh) -> None:
    """Now, not only before."""
    before = redirected_bytes(mesh.alpha)
    wait_for(mesh, lambda: redirected_bytes(mesh.alpha) > before, "data to be redirected")


def wait_for(mesh: Mesh, condition: Callable[[], bool], what: str) -> None:
    """Raises TimeoutError with the level, and why it is that."""
    try:
        wait_until(condition, what, 60)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {state(mesh.node)}") from None


def changed_sources(directory: Path) -> Path:
    """A source tree whose programs differ in a constant."""
    for package in ("bpf", "cni", "installer"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    message = directory / "bpf" / "message.c"
    text = message.read_text()
    assert text.count("(512 * 1024)") == 1
    message.write_text(text.replace("(512 * 1024)", "(256 * 1024)"))
    return directory


def test_killing_the_agent_changes_nothing(full_mesh: Mesh) -> None:
    with streaming(full_mesh):
        full_mesh.node.agent.kill()
        assert_redirecting(full_mesh)
        start_agent(full_mesh.node, LEVEL)
        assert_redirecting(full_mesh)


def test_swapping_the_programs_loses_nothing(full_mesh: Mesh, tmp_path: Path) -> None:
    changed, node = changed_sources(tmp_path / "changed"), full_mesh.node
    with streaming(full_mesh):
        node.agent.terminate()
        start_agent(node, LEVEL, changed)
        assert "programs=swapped" in node.agent.log.read_text()
        assert_redirecting(full_mesh)


def test_lowering_and_raising_the_level_loses_nothing(full_mesh: Mesh) -> None:
    with streaming(full_mesh):
        for wanted in ("off", "proxy", LEVEL):
            place = ("--cgroup", full_mesh.node.kubepods, "--cni-agent-run-dir", full_mesh.node.run_dir)
            command, said = ("accelerate", wanted, *place), f"acceleration: {wanted}"
            wait_for(full_mesh, lambda: sidestep(full_mesh, *command).startswith(said), said)  # noqa: B023
        assert_redirecting(full_mesh)


def test_detaching_loses_nothing() -> None:
    with accelerated_mesh() as mesh:
        mesh.node.agent.terminate()
        start_agent(mesh.node, LEVEL)
        mesh.node.agent.terminate()
        with streaming(mesh):
            sidestep(mesh, "detach", "--end-capture")
            assert not (mesh.node.bpffs / "sidestep").exists()
            time.sleep(1)  # what has been redirected so far is, until it ends; what comes now is not even captured


def sidestep(mesh: Mesh, *arguments: str | Path) -> str:
    """What the command prints, on this node."""
    argv = [sys.executable, "-m", "installer", *map(str, arguments), "--bpffs", str(mesh.node.bpffs)]
    return subprocess.run(argv, cwd=REPOSITORY, check=True, timeout=30, stdout=subprocess.PIPE, text=True).stdout
