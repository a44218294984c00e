"""One thing that happens in a cluster, what is held against what should be then, and how it is run and told."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import click

from tests.cluster.bed import Bed
from tests.cluster.checks import FAULTS, Check, is_as_expected


@dataclass(frozen=True)
class Scenario:
    """`checks` does things to the bed and gives what is to be looked at then, in that order.

    What it has changed it puts back at its end, however that comes: the next scenario finds the bed as it was.
    """

    name: str
    checks: Callable[[Bed], Iterable[Check]]


def select(scenarios: Sequence[Scenario], pattern: str) -> list[Scenario]:
    """Those whose names fit `pattern`, as a shell has it. Raises LookupError if there is none."""
    found = [each for each in scenarios if fnmatchcase(each.name, pattern)]
    if not found:
        raise LookupError(f"{pattern!r} is none of {', '.join(each.name for each in scenarios)}")
    return found


def run(scenario: Scenario, bed: Bed) -> tuple[int, int]:
    """How many checks were as expected, of how many. A line of each check and one of the whole."""
    began = time.monotonic()
    verdicts = _verdicts(scenario, bed)
    good, of = sum(verdicts), len(verdicts)
    click.echo(f"cluster: {scenario.name}: {good} of {of} as expected in {time.monotonic() - began:.0f} s")
    return good, of


def _verdicts(scenario: Scenario, bed: Bed) -> list[bool]:
    """Of each check; what a scenario fails of between two is one that was not as expected."""
    verdicts = []
    try:
        for check in scenario.checks(bed):
            verdicts.append(is_as_expected(check, scenario.name))
    except FAULTS as error:
        click.echo(f"{scenario.name}: it ends here: NOT as expected: {type(error).__name__}: {error}")
        verdicts.append(False)
    return verdicts
