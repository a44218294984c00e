"""The arithmetic of `make bench-faults`: what counts as a difference, the table, the last line."""

import pytest

from tests.bench.faults.scenes import LEFT_OUT, SCENES
from tests.bench.faults.table import Fault, NotRun, Row, table, verdict

FAULT = Fault("istio/istio#1", "ports are used up", "connections answered", 64)


@pytest.mark.parametrize(
    ("rules", "sidestep", "differs"),
    [
        ((64, 0, 0, 0), (64, 64, 64, 64), True),
        ((64, 64, 64, 64), (64, 0, 0, 0), True),
        ((64, 64, 64, 64), (64, 64, 64, 64), False),
        ((64, 64, 64, 63), (64, 64, 64, 64), False),
    ],
)
def test_ways_differ_by_more_than_a_twentieth(rules: tuple[int, ...], sidestep: tuple[int, ...], differs: bool) -> None:
    assert Row(FAULT, rules, sidestep).differs is differs


def test_every_round_is_in_the_table() -> None:
    done = table([Row(FAULT, (64, 0), (64, 64))], [NotRun("table full", "dropped", "it is the machine's")])
    assert done.splitlines() == [
        "| report | what was reported | counted | REDIRECT rules | sidestep | differs |",
        "| --- | --- | --- | --- | --- | --- |",
        "| istio/istio#1 | ports are used up | connections answered, of 64 a round | 64, 0 | 64, 64 | yes |",
        "| table full | dropped | not run: it is the machine's |  |  |  |",
    ]


def test_last_line_counts_the_rows_that_differ() -> None:
    rows = [Row(FAULT, (64, 0), (64, 64)), Row(FAULT, (64, 64), (64, 64))]
    assert verdict(rows) == "faults of NAT: 1 of 2 rows differ"


def test_every_figure_names_its_report() -> None:
    faults = [fault for scene in SCENES for fault in scene.faults]
    assert all(fault.report.startswith("istio/istio#") and fault.of > 0 for fault in faults)
    assert all(each.why for each in LEFT_OUT)
