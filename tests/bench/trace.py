"""`make bench-trace`: what `sidestep trace` costs those whom it watches.

With and without a trace of everything under way, in turns: new captured connections as fast as one process can make
them, and requests on new connections between two mesh pods with real Envoys, which are three connections and four
events each. Beside that, what it costs when nobody traces: programs as they are, against the same without the question
whether somebody does. Prints ratios, connections and events a second, and how many events were lost.

Exit status 1 if a trace costs more than 3 % by the median, unrounded, or anything was lost.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from tests.bench.lacking import TRACING, Connections, paired
from tests.bench.mesh.load import load
from tests.bench.mesh.scenarios import SCENARIOS, pairs
from tests.bench.mesh.workloads import WORKLOADS
from tests.lab.node import REPOSITORY, Node

_WORKLOAD = WORKLOADS["new-connection-tcp"]
_CONNECTIONS_A_REQUEST = 3  # application to proxy, proxy to proxy, proxy to application
_AIM = 0.97
_OFFERED = 10_000  # connections a second that it has to be true of


@dataclass
class Told:
    """What a trace has said, over all rounds."""

    events: int = 0
    lost: int = 0
    complaints: list[str] = field(default_factory=list)


@dataclass
class Compared:
    """One load: the rounds' rates without and with a trace, in connections a second."""

    name: str
    seconds: float  # of load with a trace
    untraced: list[float] = field(default_factory=list)
    traced: list[float] = field(default_factory=list)
    told: Told = field(default_factory=Told)

    @property
    def ratios(self) -> list[float]:
        """Of each round."""
        return [traced / untraced for traced, untraced in zip(self.traced, self.untraced, strict=True)]

    @property
    def is_met(self) -> bool:
        """Whether the median, as it is and not as it is shown, is good enough, and nothing was lost."""
        return statistics.median(self.ratios) >= _AIM and not self.told.lost

    def lines(self) -> list[str]:
        """What is printed."""
        rate, before = statistics.median(self.traced), statistics.median(self.untraced)
        short = "" if rate >= _OFFERED else f" (less than the {_OFFERED:,} that it is about)"
        return [
            f"  {self.name}, traced / not: {spread(self.ratios)}; aim ≥ {_AIM}: {'met' if self.is_met else 'NOT MET'}",
            f"    connections a second: {rate:,.0f} with a trace, {before:,.0f} without{short}",
            f"    events a second: {self.told.events / self.seconds:,.0f}; lost: {self.told.lost or 'none'}",
            *(f"    {each}" for each in self.told.complaints),
        ]


def spread(ratios: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


@contextmanager
def traced(node: Node, told: Told) -> Iterator[None]:
    """A trace of everything, into a file."""
    argv = [sys.executable, "-m", "installer", "trace", "--bpffs", str(node.bpffs), "--follow", "--output", "json"]
    output = node.directory / "trace.json"
    with output.open("w") as file:
        process = subprocess.Popen(argv, cwd=REPOSITORY, stdout=file, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        if (said := process.stderr.readline()) != "tracing\n":
            raise RuntimeError(f"the trace does not start: {said}")
        yield
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        lines = process.communicate(timeout=60)[1].splitlines()
        told.complaints += [line for line in lines if not line.startswith("traced: ")]
    finally:
        process.kill()
        process.wait()
    read(output, told)


def read(output: Path, told: Told) -> None:
    """Count what is in a trace's output."""
    with output.open() as file:
        for line in file:
            if line.startswith('{"event": "lost"'):
                told.lost += json.loads(line)["count"]
            else:
                told.events += 1


def compare(name: str, node: Node, rate: Callable[[int], float], rounds: int, seconds: int) -> Compared:
    """Both sides take turns; `rate` makes load for so long and returns connections a second."""
    found = Compared(name, rounds * seconds)
    rate(seconds)  # warms up
    for number in range(rounds):
        for is_traced in sorted((False, True), reverse=bool(number % 2)):
            if is_traced:
                with traced(node, found.told):
                    found.traced.append(rate(seconds))
            else:
                found.untraced.append(rate(seconds))
    return found


def back_to_back(rounds: int, seconds: int) -> Compared:
    """Captured connections of one process to itself; then prints what the programs cost without a trace."""
    with Node() as node, Connections(node) as connections:
        found = compare(
            "new connections", node, lambda seconds: connections.make("captured", seconds).rate, rounds, seconds
        )
        node.agent.terminate()  # or it would see to it that its own programs are attached
        off(node, connections, rounds)
        return found


def off(node: Node, connections: Connections, rounds: int) -> None:
    """Print how much more processor time it takes with programs that ask whether they are traced."""
    ratios = paired(node, connections, TRACING, ("captured", "dns"), rounds)
    for call, what in (("captured", "a captured connection"), ("dns", "connect() to a nameserver, UDP")):
        click.echo(f"  nobody traces, {what}: CPU with the question / without: {spread(ratios[call])}")


def through_envoys(rounds: int, seconds: int) -> Compared:
    """Requests of wrk, each on a connection of its own."""
    with pairs([SCENARIOS["off"]]) as living:
        pair = living["off"]

        def rate(seconds: int) -> float:
            figures = load(pair, _WORKLOAD, seconds, 0).figures
            return figures.requests / figures.seconds * _CONNECTIONS_A_REQUEST

        return compare("requests through two Envoys", pair.client.node, rate, rounds, seconds)


@click.command()
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Times both sides take turns.")
@click.option("--seconds", default=3, show_default=True, type=click.IntRange(1), help="Of load in each sample.")
def bench(rounds: int, seconds: int) -> None:
    """Compare connections/s with and without a trace: exit status 1 if it costs more than 3 % or loses anything."""
    all_met = True
    for measure in (back_to_back, through_envoys):
        found = measure(rounds, seconds)
        click.echo("\n".join(found.lines()))
        all_met = all_met and found.is_met
    sys.exit(0 if all_met else 1)


if __name__ == "__main__":
    bench()
