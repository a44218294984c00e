"""`make bench-node`: what an agent of a node with 250 pods needs: memory, time until it is ready, load when idle.

The pods are in an API server, as large as Istio's are; half of them are in the mesh, each with a namespace of its own
that is enrolled and followed. The plugin is installed, into directories of this bench. Ready is what /readyz says.
Cold is a node on which nothing is attached and no bytecode is kept, and all those pods run already, so that they are
found and enrolled first. Kept is the same with bytecode. Warm is one on which only the agent starts again. Exit status
1 when an aim is missed.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import click

from bpf.attachment import detach_programs
from bpf.kept import VARIABLE
from bpf.pins import Pins
from tests.lab.apiserver import ApiServer
from tests.lab.node import Node
from tests.lab.tenants import Tenants, resident
from tests.lab.waiting import wait_until

PODS = 250
ROUNDS = 5
IDLE_SECONDS = 60.0
_PORT = 39180


@dataclass(frozen=True)
class Figure:
    """What was measured, and the most that it should be."""

    what: str
    value: float
    unit: str
    aim: float
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it is no more than that."""
        return self.value <= self.aim

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        note = f" ({self.note})" if self.note else ""
        return f"  {self.what}: {self.value:.2f} {self.unit}{note}; aim {self.aim:g} {self.unit}, {verdict}"


def processor_seconds(pid: int) -> float:
    """User and system time so far (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_ready() -> bool:
    with suppress(URLError, OSError), urlopen(f"http://127.0.0.1:{_PORT}/readyz", timeout=1) as answer:
        return bool(answer.status == 200)
    return False


def install_privately(node: Node) -> None:
    """Have the agent keep the plugin in directories of the node's own, beside a primary plugin's configuration."""
    binaries, conf = node.directory / "cni-bin", node.directory / "cni-net.d"
    for directory in (binaries, conf):
        directory.mkdir()
    primary = {**node.conflist(), "plugins": node.conflist()["plugins"][:2]}
    (conf / "10-lab.conflist").write_text(json.dumps(primary))
    node.agent.options += ["--install", "--shim", node.shim]
    node.agent.options += ["--mounted-cni-bin-dir", binaries, "--mounted-cni-net-dir", conf]


def starts(node: Node, start: Callable[[], float]) -> list[Figure]:
    """From the agent's process to ready, all ways in turns; it runs again afterwards."""
    cold: list[float] = []
    with_bytecode: list[float] = []
    warm: list[float] = []
    os.environ[VARIABLE] = str(node.directory / "bytecode")
    for _ in range(ROUNDS):
        shutil.rmtree(node.directory / "bytecode", ignore_errors=True)
        for seconds in (cold, with_bytecode):
            node.agent.terminate()
            detach_programs(Pins(node.bpffs))
            seconds.append(start())
        node.agent.terminate()
        warm.append(start())
    return [
        Figure(f"ready, {what}", statistics.median(seconds), "s", aim, f"{min(seconds):.2f}–{max(seconds):.2f}")
        for what, seconds, aim in (("cold", cold, 4), ("kept", with_bytecode, 3), ("warm", warm, 2))
    ]


def idle(pid: int) -> Figure:
    """Load while nothing happens."""
    time.sleep(5)
    before = processor_seconds(pid)
    time.sleep(IDLE_SECONDS)
    load = (processor_seconds(pid) - before) / IDLE_SECONDS * 100
    return Figure(f"idle for {IDLE_SECONDS:.0f} s", load, "% of a core", 0.5)


def measured() -> tuple[list[Figure], int]:
    """All figures, and how many requests to the API server an idle agent made."""
    with ApiServer().running() as api, Node(api=api) as node:
        tenants = Tenants(node, PODS)
        install_privately(node)
        node.agent.options += ["--health-port", str(_PORT)]

        def start() -> float:
            started = time.perf_counter()
            node.agent.start()
            wait_until(is_ready, "readiness", 60)
            seconds = time.perf_counter() - started
            entries = node.entries()
            assert entries["pods"] == entries["links"] == entries["listeners"] == len(tenants.mesh), entries
            return seconds

        figures = starts(node, start)
        asked = sum(api.requests.values())
        figures.append(idle(node.agent.pid))
        asked = sum(api.requests.values()) - asked
        most = f"most ever {resident(node.agent.pid, 'VmHWM'):.1f}"
        what = f"resident with {PODS} pods, {len(tenants.mesh)} in the mesh"
        figures.append(Figure(what, resident(node.agent.pid), "MiB", 96, most))
    return figures, asked


@click.command()
def bench() -> None:
    """Measure, and hold it against what is aimed at."""
    figures, asked = measured()
    for each in figures:
        click.echo(str(each))
    click.echo(f"  API requests while idle: {asked}")
    if not all(each.is_met for each in figures):
        sys.exit(1)


if __name__ == "__main__":
    bench()
