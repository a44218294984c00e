"""`make conformance`: every kind of connection in every configuration, with Istio's rules and with sidestep."""

import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import click

from tests.conformance.compare import Difference, differences, is_as_predicted, predicted
from tests.conformance.configs import CONFIGS, Config
from tests.conformance.kinds import Probe, probes_of
from tests.conformance.world import BySidestep, Capture, Seen, by_iptables, world
from tests.lab.node import Node

_ROW = "{:38} {:>14}  {}"


@dataclass
class Outcome:
    """All that came out of a run."""

    probes: int = 0
    kinds: set[str] = field(default_factory=set)
    found: list[Difference] = field(default_factory=list)
    mispredicted: list[str] = field(default_factory=list)

    @property
    def unintended(self) -> list[Difference]:
        """What must not be."""
        return [each for each in self.found if each.reason is None]

    @property
    def summary(self) -> str:
        """The last line."""
        agree, intended = self.probes - len(self.found), len(self.found) - len(self.unintended)
        return f"conformance: {agree} of {self.probes} probes agree, {intended} intended differences"


def run(configs: tuple[Config, ...], outcome: Outcome) -> None:
    """Try every configuration, both ways at the same time."""
    with Node() as node, ThreadPoolExecutor(2) as pool:
        for config in configs:
            probes = probes_of(config)
            ways = [pool.submit(_try, config, capture, probes) for capture in (by_iptables, BySidestep(node))]
            iptables, sidestep = (way.result() for way in ways)
            for probe, left, right in zip(probes, iptables, sidestep, strict=True):
                _take(outcome, config, probe, left, right)
            click.echo(f"{config.name}: {len(probes)} probes", err=True)


def _try(config: Config, capture: Capture, probes: list[Probe]) -> list[Seen]:
    with world(config, capture) as made:
        return made.run(probes)


def _take(outcome: Outcome, config: Config, probe: Probe, left: Seen, right: Seen) -> None:
    outcome.probes += 1
    outcome.kinds.add(probe.kind)
    if difference := differences(config, probe, left, right):
        outcome.found.append(difference)
    expected = predicted(config, probe)
    if expected is None:
        return
    for way, seen in (("iptables", left), ("sidestep", right)):
        if not is_as_predicted(expected, probe, seen):
            outcome.mispredicted.append(f"{config.name} {probe.name}: the reference says {expected}, {way} did {seen}")


def report(outcome: Outcome) -> None:
    """Disagreements: in full where they must not be, else one row for each kind of connection."""
    for each in outcome.unintended:
        click.echo(f"DIFFERS {each.config} {each.probe}\n    iptables: {each.iptables}\n    sidestep: {each.sidestep}")
    for line in outcome.mispredicted:
        click.echo(f"REFERENCE {line}")
    intended = Counter((each.probe, each.reason) for each in outcome.found if each.reason)
    if intended:
        click.echo(_ROW.format("differs as intended", "configurations", "why (docs/differences.md)"))
    for (probe, reason), count in sorted(intended.items(), key=lambda item: (item[0][1], item[0][0])):
        click.echo(_ROW.format(probe, count, reason))


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Compare in all configurations, or in those named."""
    configs = tuple(config for config in CONFIGS if not names or config.name in names)
    outcome, began = Outcome(), time.monotonic()
    run(configs, outcome)
    report(outcome)
    kinds = len(outcome.kinds)
    click.echo(f"{kinds} kinds of connections, {len(configs)} configurations, {time.monotonic() - began:.0f} s")
    click.echo(outcome.summary)
    sys.exit(1 if outcome.unintended or outcome.mispredicted else 0)
