"""Kernel memory of an idle connection through the mesh: slabs, with sidestep against Istio's rules with conntrack.

A connection here is an application's to the server's application, so with Envoys it is three TCP connections. Each has
carried one request and is idle. Every measurement has pods of its own: their namespaces take with them what lingers.
"""

import subprocess
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click

from tests.bench.mesh.blocks import Block
from tests.bench.mesh.proxies import SERVICES
from tests.bench.mesh.ratios import Spread, spread
from tests.bench.mesh.scenarios import BASELINE, SCENARIOS, Pair, Way, pairs
from tests.lab.inside import PYTHON

CONNECTIONS = 5000
_SETTLED = 128 << 10  # bytes by which slabs may differ within a moment
_MOMENT, _PATIENCE = 0.5, 20  # seconds; moments

CLIENT = """
import socket, sys
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
request = b"GET / HTTP/1.1\\r\\nHost: idle\\r\\n\\r\\n"
made = []
for _ in range(count):
    connection = socket.create_connection((address, port), 10)
    connection.sendall(request)
    assert b" 200 " in connection.recv(4096)
    made.append(connection)
print("ready", flush=True)
sys.stdin.read()
"""


def slab() -> int:
    """Bytes of slabs, without inodes and dentries: anybody on the machine makes those (proc(5), meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("SUnreclaim:")) << 10


def caches() -> dict[str, int]:
    """Bytes of active objects by cache (slabinfo(5)); merged caches go by one of their names."""
    rows = [line.split() for line in Path("/proc/slabinfo").read_text().splitlines()[2:]]
    return {row[0]: int(row[1]) * int(row[3]) for row in rows}


def settled() -> int:
    """The slabs' bytes once they stay as they are, or after a while."""
    before = slab()
    for _ in range(_PATIENCE):
        time.sleep(_MOMENT)
        now = slab()
        if abs(now - before) < _SETTLED:
            return now
        before = now
    return before


def of_connection(pair: Pair, count: int) -> tuple[float, dict[str, float]]:
    """Bytes of slab for each of so many idle connections, and by how many each cache has grown."""
    _idle(pair, 64).communicate()  # what is allocated once, is
    before, caches_before = settled(), caches()
    process = _idle(pair, count)
    try:
        after, caches_after = settled(), caches()
    finally:
        process.kill()
        process.communicate()
    grown = {name: (size - caches_before.get(name, 0)) / count for name, size in caches_after.items()}
    return (after - before) / count, {name: round(size, 1) for name, size in grown.items() if size >= 1}


def block(rounds: int, count: int = CONNECTIONS) -> Block:
    """The table."""
    names = [name for name, each in SCENARIOS.items() if each.way is not Way.UNIX]
    found: dict[str, list[float]] = {name: [] for name in names}
    grown: dict[str, dict[str, float]] = {}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with ExitStack() as stack:
                pair = stack.enter_context(pairs([SCENARIOS[name]]))[name]
                size, grown[name] = of_connection(pair, count)
            found[name].append(size)
    base = found[BASELINE.name]
    ratios = {name: spread(ours / theirs for ours, theirs in zip(found[name], base, strict=True)) for name in names}
    rows = [_row(name, found[name], ratios[name], grown[name]) for name in names]
    note = (
        f"Unreclaimable slab that {count:,} idle keep-alive connections have added, each through both tcp_proxy\n"
        "Envoys: three TCP connections, six sockets; without a mesh one and two. Without Envoy's own memory and BPF\n"
        "maps that are allocated in advance. kmalloc has socket storage and psocks, and what is the same for all."
    )
    data = {
        name: {"bytes": found[name], "ratio": asdict(ratio), "caches": grown[name]}
        for name, ratio in ratios.items()
        if ratio
    }
    head = ["", "bytes a connection", "lowest–highest", "of which conntrack", "of which kmalloc", "ratio to iptables"]
    return Block("Kernel memory of an idle connection", head, rows, note, data)


def _row(name: str, sizes: list[float], ratio: Spread | None, grown: dict[str, float]) -> list[str]:
    size = spread(sizes)
    assert size is not None
    parts = [sum(each for cache, each in grown.items() if cache.startswith(kind)) for kind in ("nf_conn", "kmalloc")]
    return [
        name,
        f"{size.median:,.0f}",
        f"{size.low:,.0f}–{size.high:,.0f}",
        *(f"{each:,.0f}" for each in parts),
        str(ratio),
    ]


def _idle(pair: Pair, count: int) -> "subprocess.Popen[str]":
    """A process in the client's pod with so many idle connections; they are there when this returns."""
    argv = [*PYTHON, CLIENT, pair.host, str(SERVICES["tcp"].port), str(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = pair.client.popen(argv, **pipes)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(f"{count} connections could not be made in {pair.scenario.name}")
    return process


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Times all ways take turns.")
@click.option("--connections", default=CONNECTIONS, show_default=True, help="Idle ones at once.")
def bench(rounds: int, connections: int) -> None:
    """Print the table."""
    click.echo(block(rounds, connections).markdown())


if __name__ == "__main__":
    bench()
