"""`make conformance`: every kind of connection in every configuration, with Istio's rules and with sidestep."""

import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch

import click

from bpf.pins import Pins
from tests.conformance.capture import BySidestep, Capture, by_rules
from tests.conformance.compare import (
    BY_CONTAINER,
    IN_NFTABLES_MODE,
    INTENDED,
    AnyConfig,
    Difference,
    Intended,
    differences,
    is_as_predicted,
    is_fast,
    predicted,
)
from tests.conformance.configs import CONFIGS, Config
from tests.conformance.explaining import Verdicts, disagreements, explained
from tests.conformance.istio_plugin import Tools, by_istio
from tests.conformance.kinds import probes_of
from tests.conformance.parties import UNREACHABLE
from tests.conformance.probe import Probe
from tests.conformance.world import Seen, world
from tests.lab.node import Node

_ROW = "{:38} {:>14}  {}"


@dataclass
class Outcome:
    """All that came out of a run."""

    probes: int = 0
    kinds: set[str] = field(default_factory=set)
    found: list[Difference] = field(default_factory=list)
    mispredicted: list[str] = field(default_factory=list)
    explained: Counter[str] = field(default_factory=Counter)  # connections by rule
    misexplained: list[str] = field(default_factory=list)

    @property
    def unintended(self) -> list[Difference]:
        """What must not be."""
        return [each for each in self.found if each.reason is None]

    @property
    def summary(self) -> str:
        """The last line."""
        agree, intended = self.probes - len(self.found), len(self.found) - len(self.unintended)
        return f"conformance: {agree} of {self.probes} probes agree, {intended} intended differences"


def run(
    configs: tuple[Config, ...],
    outcome: Outcome,
    kinds: str = "*",
    oracle: Capture = by_rules,
    intended: tuple[Intended, ...] = INTENDED,
) -> None:
    """Try every configuration, both ways at the same time, with the kinds that fit a pattern.

    `oracle` sets up Istio's rules, `intended` are the differences that have a reason.
    """
    with Node() as node, ThreadPoolExecutor(2) as pool:
        for config in configs:
            probes = probes_that_fit(config, kinds)
            theirs = pool.submit(try_all, config, oracle, probes)
            ours = pool.submit(_try_and_explain, config, node, probes)
            istio, (sidestep, verdicts) = theirs.result(), ours.result()
            for probe, left, right, each in zip(probes, istio, sidestep, verdicts, strict=True):
                take(outcome, config, probe, left, right, intended)
                take_explained(outcome, config, probe, each, right)
            click.echo(f"{config.name}: {len(probes)} probes", err=True)


def probes_that_fit(config: Config, kinds: str) -> list[Probe]:
    """The probes of a configuration whose kinds fit a pattern."""
    return [probe for probe in probes_of(config) if fnmatch(probe.kind, kinds)]


def try_all(config: Config, capture: Capture, probes: list[Probe]) -> list[Seen]:
    """What is seen of each probe in a world of its own."""
    with world(config, capture) as made:
        return made.run(probes)


def _try_and_explain(config: Config, node: Node, probes: list[Probe]) -> tuple[list[Seen], list[Verdicts]]:
    with world(config, BySidestep(node)) as made:
        return made.run(probes), explained(Pins(node.bpffs), config, probes)


def take_explained(outcome: Outcome, config: AnyConfig, probe: Probe, verdicts: Verdicts, seen: Seen) -> None:
    """Take down what `sidestep explain` has said of a probe."""
    outcome.explained.update(each.rule for each in verdicts)
    for words in disagreements(probe, verdicts, seen):
        outcome.misexplained.append(f"{config.name} {probe.name}: explained as {words}")


def take(
    outcome: Outcome, config: AnyConfig, probe: Probe, left: Seen, right: Seen, intended: tuple[Intended, ...]
) -> None:
    """Take down what both have seen of a probe."""
    outcome.probes += 1
    outcome.kinds.add(probe.kind)
    ways = [("Istio", left), ("sidestep", right)]
    if difference := differences(config, probe, left, right, intended):
        outcome.found.append(difference)
        if difference.reason in (IN_NFTABLES_MODE.reason, BY_CONTAINER.reason):
            del ways[0]  # the reference is of the iptables mode, and of sidestep's own idea of ztunnel
    expected = predicted(config, probe)
    for way, seen in ways:
        if probe.how.startswith("fastopen") and left["hit"] not in UNREACHABLE and not is_fast(seen):
            outcome.mispredicted.append(f"{config.name} {probe.name}: data with the SYN, {way} did {seen}")
    if expected is None:
        return
    for way, seen in ways:
        if not is_as_predicted(expected, probe, seen):
            outcome.mispredicted.append(f"{config.name} {probe.name}: the reference says {expected}, {way} did {seen}")


def report(outcome: Outcome) -> None:
    """Disagreements: in full where they must not be, else one row for each kind of connection."""
    for each in outcome.unintended:
        click.echo(f"DIFFERS {each.config} {each.probe}\n    Istio:    {each.istio}\n    sidestep: {each.sidestep}")
    for line in outcome.mispredicted:
        click.echo(f"REFERENCE {line}")
    for line in outcome.misexplained:
        click.echo(f"EXPLAINED {line}")
    intended = Counter((each.probe, each.reason) for each in outcome.found if each.reason)
    if intended:
        click.echo(_ROW.format("differs as intended", "configurations", "why (docs/differences.md)"))
    for (probe, reason), count in sorted(intended.items(), key=lambda item: (item[0][1], item[0][0])):
        click.echo(_ROW.format(probe, count, reason))


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--kinds", default="*", help="Only kinds of connections that fit this pattern, such as route.*", show_default=True
)
@click.option(
    "--plugin",
    type=click.Choice([each.value for each in Tools]),
    help="Have Istio's own CNI plugin write the rules, with these tools. Without, they are written as it would.",
)
def main(names: tuple[str, ...], kinds: str, plugin: str | None) -> None:
    """Compare in all configurations, or in those named."""
    configs = tuple(config for config in CONFIGS if not names or config.name in names)
    outcome, began = Outcome(), time.monotonic()
    try:
        with by_istio(Tools(plugin)) if plugin else nullcontext(by_rules) as oracle:
            run(configs, outcome, kinds, oracle, INTENDED + ((IN_NFTABLES_MODE,) if plugin == Tools.NFTABLES else ()))
    except LookupError as error:
        sys.exit(f"conformance: {error}")
    report(outcome)
    click.echo(
        f"{len(outcome.kinds)} kinds of connections, {len(configs)} configurations, {time.monotonic() - began:.0f} s"
    )
    wrong = len(outcome.misexplained)
    click.echo(f"{outcome.explained.total()} connections explained by {len(outcome.explained)} rules, {wrong} wrongly")
    click.echo(outcome.summary)
    sys.exit(1 if outcome.unintended or outcome.mispredicted or wrong else 0)
