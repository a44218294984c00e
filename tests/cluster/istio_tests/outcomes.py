"""What became of each case of a run, from the events of `go tool test2json`, and how two runs compare."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tests.cluster.istio_tests.names import Names


class Outcome(StrEnum):
    """As test2json calls them."""

    PASSED = "pass"
    FAILED = "fail"
    SKIPPED = "skip"
    UNFINISHED = "run"  # it began, and the run ended before it did


Outcomes = Mapping[str, Outcome]  # of each test, with those that only have tests below them


def outcomes_of(events: Iterable[str]) -> dict[str, Outcome]:
    """From lines of JSON, by lasting names; the last word about a test counts."""
    names = Names()
    found: dict[str, Outcome] = {}
    for line in events:
        event = json.loads(line)
        if "Test" in event and event["Action"] in set(Outcome):
            found[names.lasting(event["Test"])] = Outcome(event["Action"])
    return found


_COMPLAINT = re.compile(r" +\w+\.go:\d+: (.+)")


def reasons_of(events: Iterable[str]) -> dict[str, str]:
    """The last thing that each test has said for itself, `file.go:LINE: …`, in one line."""
    names = Names()
    found: dict[str, str] = {}
    for line in events:
        event = json.loads(line)
        if "Test" not in event:
            continue
        name = names.lasting(event["Test"])
        if said := _COMPLAINT.match(event.get("Output", "")):
            found[name] = said[1].strip()
    return found


@dataclass
class Comparison:
    """Cases by name, each in one list: with Istio's plugin a run went `there`, with sidestep `here`."""

    passed: list[str] = field(default_factory=list)
    failed_as_there: list[str] = field(default_factory=list)
    # what Istio's plugin passes and sidestep does not, or what fails and was never tried there
    otherwise: list[str] = field(default_factory=list)
    passed_here_alone: list[str] = field(default_factory=list)
    # failed here, and passed when it was the only one to run
    passed_when_repeated: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    # failed there, and here it was skipped or not reached
    untold: list[str] = field(default_factory=list)

    @property
    def passed_here(self) -> int:
        """How many passed with sidestep, at the latest when they were repeated."""
        return len(self.passed) + len(self.passed_here_alone) + len(self.passed_when_repeated)


def compare(there: Outcomes, here: Outcomes) -> Comparison:
    """Every case of both runs."""
    found = Comparison()
    for name in sorted({*cases(there), *cases(here)}):
        _place(found, name, there.get(name), here.get(name))
    return found


def settle(found: Comparison, again: Outcomes) -> None:
    """Of what was `otherwise`, whatever passes in a run of these cases alone is listed as such."""
    good = [name for name in found.otherwise if again.get(name) == Outcome.PASSED]
    found.passed_when_repeated += good
    found.otherwise = [name for name in found.otherwise if name not in good]


def cases(outcomes: Outcomes) -> list[str]:
    """Tests without tests below them, and those that failed although nothing below them did."""
    parents = {name[:at] for name in outcomes for at, letter in enumerate(name) if letter == "/"}
    bad = [name for name, outcome in outcomes.items() if outcome in (Outcome.FAILED, Outcome.UNFINISHED)]
    blamed = {name[:at] for name in bad for at, letter in enumerate(name) if letter == "/"}
    return [name for name in outcomes if name not in parents or (name in bad and name not in blamed)]


def unfinished(outcomes: Outcomes) -> list[str]:
    """Tests that were running when the run ended."""
    return [name for name, outcome in outcomes.items() if outcome == Outcome.UNFINISHED]


def _place(found: Comparison, name: str, there: Outcome | None, here: Outcome | None) -> None:
    if here == Outcome.PASSED:
        (found.passed if there == Outcome.PASSED else found.passed_here_alone).append(name)
    elif there == Outcome.PASSED:
        found.otherwise.append(name)
    elif here in (Outcome.FAILED, Outcome.UNFINISHED):
        (found.failed_as_there if there == Outcome.FAILED else found.otherwise).append(name)
    elif there == Outcome.FAILED:
        found.untold.append(name)
    else:
        found.skipped.append(name)
