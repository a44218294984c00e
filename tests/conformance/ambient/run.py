"""`make conformance-ambient`: the same for pods in ambient mode."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import click

from bpf.pins import Pins
from tests.conformance.ambient.capture import ByRules, BySidestep, by_sidestep
from tests.conformance.ambient.configs import CONFIGS
from tests.conformance.ambient.kinds import probes_of
from tests.conformance.capture import AmbientCapture
from tests.conformance.compare import AMBIENT_INTENDED
from tests.conformance.configs import AmbientConfig
from tests.conformance.explaining import Verdicts, explained
from tests.conformance.probe import Probe
from tests.conformance.run import Outcome, report, take, take_explained
from tests.conformance.world import Seen, world
from tests.datapath.wires import fresh_kernel


def run(configs: tuple[AmbientConfig, ...], outcome: Outcome, kinds: str = "*") -> None:
    """Try every configuration, both ways at the same time, with the kinds that fit a pattern."""
    with fresh_kernel() as kernel, by_sidestep(kernel) as sidestep, ThreadPoolExecutor(2) as pool:
        for config in configs:
            probes = [probe for probe in probes_of(config) if fnmatch(probe.kind, kinds)]
            theirs = pool.submit(_try_all, config, ByRules(), None, probes)
            ours = pool.submit(_try_and_explain, config, sidestep, kernel.pins, probes)
            for probe, left, (right, verdicts) in zip(probes, theirs.result(), ours.result(), strict=True):
                take(outcome, config, probe, left, right, AMBIENT_INTENDED)
                take_explained(outcome, config, probe, verdicts, right)
            click.echo(f"{config.name}: {len(probes)} probes", err=True)


def _try_all(config: AmbientConfig, capture: AmbientCapture, ztunnel: Path | None, probes: list[Probe]) -> list[Seen]:
    with world(config, capture, ztunnel) as made:
        return made.run(probes)


def _try_and_explain(
    config: AmbientConfig, sidestep: BySidestep, pins: Pins, probes: list[Probe]
) -> list[tuple[Seen, Verdicts]]:
    with world(config, sidestep, sidestep.ztunnel) as made:
        return list(zip(made.run(probes), explained(pins, config, probes), strict=True))


@click.command()
@click.argument("names", nargs=-1)
@click.option("--kinds", default="*", help="Only kinds of connections that fit this pattern.", show_default=True)
def main(names: tuple[str, ...], kinds: str) -> None:
    """Compare in all configurations of pods in ambient mode, or in those named."""
    configs = tuple(config for config in CONFIGS if not names or config.name in names)
    outcome, began = Outcome(), time.monotonic()
    run(configs, outcome, kinds)
    report(outcome)
    seconds = time.monotonic() - began
    click.echo(f"{len(outcome.kinds)} kinds of connections, {len(configs)} configurations, {seconds:.0f} s")
    wrong = len(outcome.misexplained)
    click.echo(f"{outcome.explained.total()} connections explained by {len(outcome.explained)} rules, {wrong} wrongly")
    click.echo(outcome.summary)
    sys.exit(1 if outcome.unintended or outcome.mispredicted or wrong else 0)
