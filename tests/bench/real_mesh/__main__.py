"""`make bench-mesh`: pods of a real mesh under Istio's own plugin and under sidestep at every level, interleaved.

Needs a quiet machine: a whole Kubernetes and the load share its cores.
"""

import sys
from pathlib import Path

import click

from tests.bench.mesh.cpu import busy_cores
from tests.bench.mesh.results import Results, machine, read
from tests.bench.mesh.turns import take_turns
from tests.bench.mesh.workloads import WORKLOADS
from tests.bench.real_mesh.asking import ask, wait_until_answered
from tests.bench.real_mesh.image import SERVED
from tests.bench.real_mesh.page import page
from tests.bench.real_mesh.pairs import WAYS, NotCaptured, make_pairs
from tests.cluster import istio_source
from tests.cluster.bed import Bed
from tests.cluster.builder import BuildFailed, build_all
from tests.cluster.cluster import Cluster
from tests.cluster.components import components
from tests.cluster.host import CommandFailed, DaemonEnded
from tests.cluster.mesh import WITHOUT_ACCESS_LOG
from tests.lab.demo import exit_on_signals
from tests.lab.node import REPOSITORY

OUTPUT = REPOSITORY / "bench" / "results"
LOADS = [name for name, each in WORKLOADS.items() if each.service in SERVED]


def publish(results: Results, output: Path) -> None:
    """What is made of the figures."""
    results.write(output / "real-mesh.json")
    (output / "real-mesh.md").write_text(page(results))
    say(f"{output / 'real-mesh.md'}: {len(results.samples)} samples, {len(results.failures)} failures")


def say(line: str) -> None:
    """One line of progress."""
    click.echo(f"bench-mesh: {line}", err=True)


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Times all pairs take turns at every workload.")
@click.option("--seconds", default=3, show_default=True, help="Of load in each sample.")
@click.option("--only", multiple=True, type=click.Choice(LOADS), help="A workload; may be repeated.")
@click.option("--output", default=OUTPUT, type=click.Path(path_type=Path), help="Directory of the results.")
@click.option("--quick", is_flag=True, help="One round of a second: does it run?")
@click.option("--seed", default=1, show_default=True, help="Of the order in which pairs take turns.")
@click.option("--render", is_flag=True, help="Only make the page again, of the figures that are there.")
def bench(rounds: int, seconds: int, only: tuple[str, ...], output: Path, quick: bool, seed: int, render: bool) -> None:
    """Compare Istio's own plugin and sidestep at every level, in one mesh."""
    if render:
        publish(read(output / "real-mesh.json"), output)
        return
    exit_on_signals()
    rounds, seconds = (1, 1) if quick else (rounds, seconds)
    try:
        build_all(components(), say=say)
        busy = busy_cores(0.5 if quick else 3)
        with Cluster() as cluster:
            bed = Bed.of(cluster)
            bed.start_nodes()
            bed.mesh.install(WITHOUT_ACCESS_LOG)
            pairs = {pair.way: pair for pair in make_pairs(bed)}
            where = machine() | {"mesh": "; ".join([*bed.releases(), f"Istio {istio_source.release()}"])}
            results = Results(rounds, seconds, seed, where, list(WAYS), list(only) or LOADS, busy)
            for pair in pairs.values():
                for name in results.workloads:
                    wait_until_answered(bed, pair, WORKLOADS[name])
            take_turns(
                results,
                lambda way, workload, number: ask(bed, pairs[way], workload, seconds, number),
                output / "real-mesh.json",
                say,
            )
    except (BuildFailed, CommandFailed, DaemonEnded, NotCaptured, TimeoutError) as error:
        sys.exit(f"bench-mesh: {error}")
    publish(results, output)


if __name__ == "__main__":
    bench()
