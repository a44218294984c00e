"""`make bench-agent`: from starting the agent's process to its socket answering.

Cold: nothing is pinned, and the programs are compiled. Kept: nothing is pinned, but their bytecode is there. Warm: same
sources, everything pinned. Swap: the sources have changed, and the bytecode of both is there. Interpreter start and
imports are counted. Beside them the time `sidestep attach` itself takes, whole process, and the self-test that decides
about acceleration, which nobody waits for.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from bpf.attachment import detach_programs
from bpf.kept import VARIABLE
from bpf.pins import Pins
from installer.acceleration.selftest import try_kernel
from tests.lab.node import REPOSITORY, Node
from tests.lab.sources import changed_copy

ROUNDS = 7


def measure(name: str, prepare: Callable[[], object], work: Callable[[], object]) -> None:
    """Print minimum, median and maximum of several rounds."""
    seconds = []
    for _ in range(ROUNDS):
        prepare()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    click.echo(f"  {name:34}{min(seconds):6.3f}  {statistics.median(seconds):6.3f}  {max(seconds):6.3f}")


@click.command()
def bench() -> None:
    """Time every way to start."""
    with Node() as node, tempfile.TemporaryDirectory() as scratch:
        bytecode = Path(scratch) / "bytecode"
        os.environ[VARIABLE] = str(bytecode)
        other, agent = changed_copy(Path(scratch), "maps.h", "0x7f400000", "0x7fc00000"), node.agent

        def attach() -> None:
            places = ["--bpffs", str(node.bpffs), "--cgroup", str(node.kubepods)]
            argv = [sys.executable, "-m", "installer", "attach", *places]
            subprocess.run(argv, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)

        def forget() -> None:
            agent.terminate()
            detach_programs(Pins(node.bpffs))

        def forget_all() -> None:
            forget()
            shutil.rmtree(bytecode, ignore_errors=True)

        def swap_away() -> None:
            agent.terminate()
            agent.start(other)
            agent.terminate()

        click.echo(f"  {'seconds, ' + str(ROUNDS) + ' rounds':34}{'min':>6}  {'median':>6}  {'max':>6}")
        measure("agent ready, cold", forget_all, agent.start)
        measure("agent ready, bytecode kept", forget, agent.start)
        measure("agent ready, warm", agent.terminate, agent.start)
        measure("agent ready after kill -9", agent.kill, agent.start)
        measure("agent ready, programs swapped", swap_away, agent.start)
        agent.terminate()
        measure("sidestep attach, cold", forget_all, attach)
        measure("sidestep attach, bytecode kept", forget, attach)
        measure("sidestep attach, warm", lambda: None, attach)
        measure("self-test of acceleration", lambda: None, lambda: try_kernel(node.kubepods))


if __name__ == "__main__":
    bench()
