"""`make bench-faults`: public reports of faults of Istio's NAT, with its REDIRECT rules and with sidestep.

Two pods alike, each with a stand-in for its proxy and a cable to a server outside of the mesh. Istio's iptables rules
capture one, sidestep the other. They take turns in every round. Prints a table in markdown, and in its last line how
many of its rows differ on this kernel.
"""

import os
from contextlib import ExitStack

import click

from tests.bench.faults.scenes import LEFT_OUT, SCENES, Scene, prepare
from tests.bench.faults.table import Row, Way, table, verdict
from tests.conformance.capture import by_rules
from tests.conformance.configs import Config
from tests.datapath.wires import Kernel, Wire, fresh_kernel, make_wire


def captured(way: Way, kernel: Kernel, undo: ExitStack) -> Wire:
    """A pod of its own and its peer."""
    wire = make_wire(kernel, undo)
    if way is Way.SIDESTEP:
        wire.enrol()
    else:
        wire.pod.cgroup = None  # where no program runs
        by_rules(undo, Config("default"), wire.pod.path)
    return wire


def play(scene: Scene, kernel: Kernel, rounds: int) -> list[Row]:
    """Every round both ways, the first of the two in turns."""
    counts: dict[Way, list[tuple[int, ...]]] = {way: [] for way in Way}
    with ExitStack() as undo:
        wires = {way: captured(way, kernel, undo) for way in Way}
        for wire in wires.values():
            prepare(scene, wire)
        for number in range(rounds):
            for way in sorted(Way, reverse=bool(number % 2)):
                counts[way].append(scene.count(wires[way], number))
    by_fault = {way: list(zip(*counts[way], strict=True)) for way in Way}
    return [Row(*each) for each in zip(scene.faults, by_fault[Way.RULES], by_fault[Way.SIDESTEP], strict=True)]


@click.command()
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(min=1), help="How often both take turns.")
def bench(rounds: int) -> None:
    """Count what public reports of Istio's NAT are about, with REDIRECT rules and with sidestep."""
    rows: list[Row] = []
    with fresh_kernel() as kernel:
        for scene in SCENES:
            rows += play(scene, kernel, rounds)
    click.echo(f"Linux {os.uname().release}, {rounds} rounds\n\n{table(rows, LEFT_OUT)}\n\n{verdict(rows)}")


if __name__ == "__main__":
    bench()
