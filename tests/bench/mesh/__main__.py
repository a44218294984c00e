"""`make bench`: what capture and acceleration cost and gain, against Istio's iptables rules in the same run.

Needs a quiet machine: client, Envoys and server share its cores, and CPU is the whole machine's.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from tests.bench.mesh.beside import BLOCKS
from tests.bench.mesh.cpu import busy_cores
from tests.bench.mesh.load import load
from tests.bench.mesh.markdown import page
from tests.bench.mesh.plots import plot
from tests.bench.mesh.ratios import BASELINE, Metric
from tests.bench.mesh.results import Results, machine, read
from tests.bench.mesh.scenarios import SCENARIOS, pairs
from tests.bench.mesh.turns import take_turns
from tests.bench.mesh.workloads import WORKLOADS
from tests.lab.node import REPOSITORY

OUTPUT = REPOSITORY / "bench" / "results"


def publish(results: Results, output: Path) -> None:
    """Everything that is made of the figures."""
    results.write(output / "mesh.json")
    (output / "mesh.md").write_text(page(results))
    for metric in Metric:
        (output / f"mesh-{metric}.svg").write_text(plot(results, metric))


@dataclass(frozen=True)
class Choice:
    """What of all that there is."""

    scenarios: list[str]
    workloads: list[str]
    blocks: list[str]


def chosen(only: tuple[str, ...]) -> Choice:
    """By names; everything where none is named. Load needs a workload or a way, and then has all of the other."""
    everything = (*SCENARIOS, *WORKLOADS, *BLOCKS)
    for name in only:
        if name not in everything:
            raise click.UsageError(f"--only {name}: there are {', '.join(everything)}")
    if not only:
        return Choice(list(SCENARIOS), list(WORKLOADS), list(BLOCKS))
    blocks = [name for name in BLOCKS if name in only]
    ways = [name for name in SCENARIOS if name in only]
    workloads = [name for name in WORKLOADS if name in only]
    if not ways and not workloads:
        return Choice([], [], blocks)
    ways = [name for name in SCENARIOS if name in ways or name == BASELINE] if ways else list(SCENARIOS)
    return Choice(ways, workloads or list(WORKLOADS), blocks)


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Times all pairs take turns at every workload.")
@click.option("--seconds", default=3, show_default=True, help="Of load in each sample.")
@click.option(
    "--only",
    multiple=True,
    help="A way, a workload, or what is measured beside; may be repeated. iptables is always there.",
)
@click.option("--output", default=OUTPUT, type=click.Path(path_type=Path), help="Directory of the results.")
@click.option("--quick", is_flag=True, help="One round of a second: does it run?")
@click.option("--seed", default=1, show_default=True, help="Of the order in which pairs take turns.")
@click.option("--render", is_flag=True, help="Only make tables and plots again, of the figures that are there.")
def bench(rounds: int, seconds: int, only: tuple[str, ...], output: Path, quick: bool, seed: int, render: bool) -> None:
    """Compare no mesh, iptables, sidestep at every level and chained Envoys."""
    if render:
        known = read(output / "mesh.json")
        if not known.is_mutual:
            raise click.UsageError(f"{output / 'mesh.json'} is of Envoys without mTLS, which its page would not say")
        publish(known, output)
        return
    choice = chosen(only)
    rounds, seconds = (1, 1) if quick else (rounds, seconds)
    busy = busy_cores(0.5 if quick else 3)
    results = Results(rounds, seconds, seed, machine(), choice.scenarios, choice.workloads, busy, is_mutual=True)
    if choice.workloads:
        with pairs([SCENARIOS[name] for name in choice.scenarios]) as living:
            take_turns(
                results,
                lambda name, workload, number: load(living[name], workload, seconds, number),
                output / "mesh.json",
                lambda line: click.echo(line, err=True),
            )
            results.traffic = {name: pair.traffic() for name, pair in living.items() if pair.traffic()}
    for name in choice.blocks:
        click.echo(name, err=True)
        results.beside.append(asdict(BLOCKS[name](rounds)))
        results.write(output / "mesh.json")
    publish(results, output)
    click.echo(f"{output / 'mesh.md'}: {len(results.samples)} samples, {len(results.failures)} failures")


if __name__ == "__main__":
    bench()
