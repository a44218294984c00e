"""`make bench-trace`: what `sidestep trace` costs those whom it watches.

Two mesh pods with real Envoys and a new connection for each request, which makes four events of each; with and without
a trace of everything under way, in turns. Prints the ratio of requests/s, how many events a second there were, and how
many were lost.
"""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from tests.bench.mesh.load import load
from tests.bench.mesh.measure import Figures
from tests.bench.mesh.scenarios import SCENARIOS, Pair, pairs
from tests.bench.mesh.workloads import WORKLOADS
from tests.lab.node import REPOSITORY

_WORKLOAD = WORKLOADS["new-connection-tcp"]


@dataclass
class Told:
    """What a trace has said, over all rounds."""

    events: int = 0
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)


@contextmanager
def traced(pair: Pair, told: Told) -> Iterator[None]:
    """A trace of everything, into a file."""
    pins = str(pair.client.node.bpffs)
    argv = [sys.executable, "-m", "installer", "trace", "--bpffs", pins, "--follow", "--output", "json"]
    output = pair.files / "trace.json"
    with output.open("w") as file:
        process = subprocess.Popen(argv, cwd=REPOSITORY, stdout=file, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # "tracing"
    started = time.monotonic()
    try:
        yield
    finally:
        told.seconds += time.monotonic() - started
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
        told.complaints += said.splitlines()
        told.events += _lines(output)


def _rate(figures: Figures) -> float:
    return figures.requests / figures.seconds


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Times both sides take turns.")
@click.option("--seconds", default=3, show_default=True, help="Of load in each sample.")
def bench(rounds: int, seconds: int) -> None:
    """Compare requests/s with and without a trace."""
    ratios: list[float] = []
    told = Told()
    with pairs([SCENARIOS["off"]]) as living:
        pair = living["off"]
        load(pair, _WORKLOAD, seconds, 0)  # warms up
        for number in range(rounds):
            rates: dict[bool, float] = {}
            for is_traced in sorted((False, True), reverse=bool(number % 2)):
                if is_traced:
                    with traced(pair, told):
                        rates[is_traced] = _rate(load(pair, _WORKLOAD, seconds, number).figures)
                else:
                    rates[is_traced] = _rate(load(pair, _WORKLOAD, seconds, number).figures)
            ratios.append(rates[True] / rates[False])
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    click.echo(f"  requests/s, traced / not: {spread}; aim ≥ 0.97")
    click.echo(f"  events a second: {told.events / told.seconds:,.0f}; lost: {'; '.join(told.complaints) or 'none'}")


if __name__ == "__main__":
    bench()
