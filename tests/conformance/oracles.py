"""`make conformance-oracles`: the rules that the suite writes beside those of Istio's own plugin.

What a run without the plugin says of sidestep holds as far as these two agree.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import click

from tests.conformance.capture import by_rules
from tests.conformance.compare import IN_NFTABLES_MODE, differences
from tests.conformance.configs import CONFIGS, Config
from tests.conformance.istio_plugin import ByIstio, Tools, by_istio
from tests.conformance.run import probes_that_fit, try_all

_TOOLS = [each.value for each in Tools]


@dataclass
class Outcome:
    """Of one comparison."""

    agree: int = 0
    intended: int = 0
    differ: list[str] = field(default_factory=list)  # in words

    def __str__(self) -> str:
        count = self.agree + self.intended + len(self.differ)
        return f"{self.agree} of {count} probes agree, {self.intended} intended differences"


def compare(configs: tuple[Config, ...], plugin: ByIstio, kinds: str) -> Outcome:
    """Make every probe both ways."""
    intended = (IN_NFTABLES_MODE,) if plugin.tools is Tools.NFTABLES else ()
    outcome = Outcome()
    with ThreadPoolExecutor(2) as pool:
        for config in configs:
            probes = probes_that_fit(config, kinds)
            ways = [pool.submit(try_all, config, capture, probes) for capture in (by_rules, plugin)]
            for probe, ours, theirs in zip(probes, *(way.result() for way in ways), strict=True):
                difference = differences(config, probe, ours, theirs, intended)
                if not difference:
                    outcome.agree += 1
                elif difference.reason:
                    outcome.intended += 1
                else:
                    outcome.differ.append(f"{config.name} {probe.name}\n    rules:  {ours}\n    plugin: {theirs}")
    return outcome


@click.command()
@click.argument("names", nargs=-1)
@click.option("--kinds", default="*", help="Only kinds of connections that fit this pattern.", show_default=True)
@click.option("--plugin", "chosen", type=click.Choice(_TOOLS), multiple=True, default=_TOOLS)
def oracles(names: tuple[str, ...], kinds: str, chosen: tuple[str, ...]) -> None:
    """Compare in all configurations, or in those named, with each of the plugin's tools."""
    configs = tuple(config for config in CONFIGS if not names or config.name in names)
    agreed = True
    for tools in map(Tools, chosen):
        began = time.monotonic()
        try:
            with by_istio(tools) as plugin:
                outcome = compare(configs, plugin, kinds)
        except LookupError as error:
            sys.exit(f"oracles: {error}")
        for line in outcome.differ:
            click.echo(f"DIFFERS {line}")
        agreed = agreed and not outcome.differ
        click.echo(f"oracles: {tools}: {outcome}, {time.monotonic() - began:.0f} s")
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    oracles()
