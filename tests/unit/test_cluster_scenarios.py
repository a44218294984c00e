"""Which scenarios `make cluster` runs, and what is said and counted of them."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import cast

import pytest

from tests.cluster.bed import Bed
from tests.cluster.checks import Check
from tests.cluster.scenario import Scenario, run, select
from tests.cluster.scenarios import SCENARIOS
from tests.cluster.side_by_side import run_on

BED = cast(Bed, None)  # these scenarios do nothing with it


def fine(_: Bed) -> list[Check]:
    return [Check("one", str), Check("two", str)]


def breaking(_: Bed) -> Iterator[Check]:
    yield Check("three", str)
    raise TimeoutError("waited 30 s for nothing")


def test_each_file_of_the_folder_is_a_scenario_that_runs() -> None:
    files = {path.stem for path in Path("tests/cluster/scenarios").glob("*.py")} - {"__init__"}
    assert files == {each.checks.__module__.rpartition(".")[2] for each in SCENARIOS}
    assert len({each.name for each in SCENARIOS}) == len(SCENARIOS)


def test_scenarios_are_selected_as_a_shell_selects_files() -> None:
    some = [Scenario(name, fine) for name in ("base", "life-kill", "life-rollout")]
    assert select(some, "*") == some
    assert select(some, "life-*") == some[1:]
    with pytest.raises(LookupError, match="'lief' is none of base, life-kill, life-rollout"):
        select(some, "lief")


def test_checks_are_made_while_they_run() -> None:
    """A check looks at what the scenario has done just before it."""
    happened = []

    def acting(_: Bed) -> Iterator[Check]:
        for step in ("first", "second"):
            happened.append(step)
            yield Check(step, lambda step=step: "" if happened[-1] == step else happened[-1])  # type: ignore[misc]

    assert run(Scenario("acts", acting), BED) == (2, 2)


def test_a_scenario_that_breaks_off_counts_as_a_fault_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_on([BED], [Scenario("breaks", breaking), Scenario("works", fine)], lambda bed: bed) == (3, 4)
    assert capsys.readouterr().out.splitlines() == [
        "breaks: three: as expected",
        "breaks: it ends here: NOT as expected: TimeoutError: waited 30 s for nothing",
        "cluster: breaks: 1 of 2 as expected in 0 s",
        "works: one: as expected",
        "works: two: as expected",
        "cluster: works: 2 of 2 as expected in 0 s",
    ]


def test_whichever_cluster_has_ended_a_scenario_takes_the_next() -> None:
    slow_has_one, fast_has_two = Event(), Event()
    ran: dict[str, list[str]] = {"slow": [], "fast": []}

    def of(name: str) -> Scenario:
        def checks(bed: Bed) -> Iterator[Check]:
            place = cast(str, bed)
            ran[place].append(name)
            if len(ran["fast"]) == 2:
                fast_has_two.set()
            if place == "slow":
                slow_has_one.set()
            other = {"slow": fast_has_two, "fast": slow_has_one}[place]
            yield Check("the other is at work", lambda: "" if other.wait(10) else "it is not")

        return Scenario(name, checks)

    places = cast(list[Bed], ["slow", "fast"])
    assert run_on(places, [of(name) for name in "abc"], lambda bed: bed) == (3, 3)
    assert len(ran["slow"]) == 1
    assert sorted(ran["slow"] + ran["fast"]) == ["a", "b", "c"]


def test_a_cluster_that_does_not_come_up_ends_the_run() -> None:
    def breaks(_: Bed) -> Bed:
        raise TimeoutError("no API server")

    with pytest.raises(TimeoutError, match="no API server"):
        run_on([BED], [Scenario("works", fine)], breaks)
