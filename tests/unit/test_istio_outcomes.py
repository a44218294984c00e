"""How runs of Istio's tests are read and compared (tests/cluster/istio_tests)."""

import json
import re

import pytest

from tests.cluster.istio_tests.names import Names, pattern_of
from tests.cluster.istio_tests.outcomes import Outcome, cases, compare, outcomes_of, reasons_of, settle, unfinished
from tests.cluster.istio_tests.suites import SUITES, select

PASSED, FAILED, SKIPPED, UNFINISHED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED, Outcome.UNFINISHED


def events(*pairs: tuple[str, str]) -> list[str]:
    return [json.dumps({"Action": action, "Test": name}) for action, name in pairs]


def test_the_last_word_about_a_test_counts() -> None:
    lines = events(("run", "TestA"), ("output", "TestA"), ("pause", "TestA"), ("cont", "TestA"), ("fail", "TestA"))
    assert outcomes_of([*lines, '{"Action":"fail"}']) == {"TestA": FAILED}


def test_a_test_that_was_running_when_the_run_ended_is_unfinished() -> None:
    found = outcomes_of(events(("run", "TestA"), ("run", "TestA/b"), ("pass", "TestA/b")))
    assert unfinished(found) == ["TestA"]


def test_the_last_complaint_of_a_test_is_its_reason() -> None:
    said = (
        "=== RUN   TestA\n",
        "    a.go:12: first\n",
        "    b.go:3: got 503, wanted 200\n",
        "    more\n",
        "--- FAIL: TestA\n",
    )
    lines = [json.dumps({"Action": "output", "Test": "TestA", "Output": each}) for each in said]
    assert reasons_of([*lines, '{"Action":"output","Output":"    c.go:1: nobody\\n"}']) == {
        "TestA": "got 503, wanted 200"
    }


def test_tests_that_only_group_others_are_no_cases() -> None:
    assert cases({"TestA": PASSED, "TestA/b": PASSED, "TestA/b/c": PASSED, "TestB": SKIPPED}) == ["TestA/b/c", "TestB"]


def test_a_group_that_fails_because_of_a_case_is_none() -> None:
    assert cases({"TestA": FAILED, "TestA/b": FAILED, "TestA/c": PASSED}) == ["TestA/b", "TestA/c"]


def test_a_group_that_fails_by_itself_is_a_case() -> None:
    assert cases({"TestA": FAILED, "TestA/b": PASSED}) == ["TestA", "TestA/b"]


@pytest.mark.parametrize(
    ("there", "here", "kind"),
    [
        (PASSED, PASSED, "passed"),
        (FAILED, FAILED, "failed_as_there"),
        (FAILED, UNFINISHED, "failed_as_there"),
        (FAILED, PASSED, "passed_here_alone"),
        (None, PASSED, "passed_here_alone"),
        (PASSED, FAILED, "otherwise"),
        (PASSED, UNFINISHED, "otherwise"),
        (PASSED, SKIPPED, "otherwise"),
        (PASSED, None, "otherwise"),
        (None, FAILED, "otherwise"),
        (SKIPPED, FAILED, "otherwise"),
        (FAILED, None, "untold"),
        (FAILED, SKIPPED, "untold"),
        (SKIPPED, SKIPPED, "skipped"),
    ],
)
def test_each_case_is_told_once(there: Outcome | None, here: Outcome | None, kind: str) -> None:
    found = compare({"TestA": there} if there else {}, {"TestA": here} if here else {})
    assert {name: names for name, names in vars(found).items() if names} == {kind: ["TestA"]}


def test_a_group_that_fails_here_alone_is_otherwise_although_its_cases_pass() -> None:
    found = compare({"TestA": PASSED, "TestA/b": PASSED}, {"TestA": FAILED, "TestA/b": PASSED})
    assert (found.passed, found.otherwise) == (["TestA/b"], ["TestA"])


def test_cases_below_a_group_that_ended_early_here_are_otherwise() -> None:
    found = compare({"TestA": PASSED, "TestA/b": PASSED}, {"TestA": FAILED})
    assert found.otherwise == ["TestA", "TestA/b"]


def test_what_passes_when_repeated_is_told_as_that() -> None:
    found = compare({"TestA": PASSED, "TestB": PASSED}, {"TestA": FAILED, "TestB": FAILED})
    settle(found, {"TestA": PASSED, "TestB": FAILED})
    assert (found.passed, found.passed_when_repeated, found.otherwise) == ([], ["TestA"], ["TestB"])
    assert found.passed_here == 1


def test_repeated_cases_are_found_by_their_whole_names() -> None:
    assert pattern_of(["TestA/b.c/(d)", "TestE"]) == r"^TestA$/^b\.c$/^\(d\)$|^TestE$"
    assert not re.search(pattern_of(["TestE"]), "TestEF")


@pytest.mark.parametrize(
    ("name", "lasting"),
    [
        ("TestA/host/b.echo-1-35924.svc:80/http", "TestA/host/b.echo-N-N.svc:80/http"),
        ("TestA/probe-10.65.89.234", "TestA/probe-ADDRESSv4"),
        ("TestA/probe-fd66:0:0:2::3", "TestA/probe-ADDRESSv6"),
        ("TestA/dns/1.2.3.4", "TestA/dns/1.2.3.4"),
        ("TestA/from_primary-0/10:20:30", "TestA/from_primary-0/10:20:30"),
    ],
)
def test_what_changes_from_run_to_run_is_not_in_a_lasting_name(name: str, lasting: str) -> None:
    assert Names().lasting(name) == lasting
    levels = zip(pattern_of([lasting]).split("/"), name.split("/"), strict=True)
    assert all(re.search(level, own) for level, own in levels)


def test_tests_whose_names_differ_by_chance_alone_are_counted() -> None:
    names = Names()
    told = [
        names.lasting(name) for name in ("TestA/10.66.1.2", "TestA/10.66.1.3", "TestA/10.66.1.3/b", "TestA/10.66.1.2")
    ]
    assert told == ["TestA/ADDRESSv4", "TestA/ADDRESSv4~2", "TestA/ADDRESSv4~2/b", "TestA/ADDRESSv4"]


def test_a_suite_is_chosen_by_its_name() -> None:
    assert [each.name for each in select("race-*")] == ["race-repair", "race-delete"]
    assert select("*") == list(SUITES)
    with pytest.raises(LookupError, match="'other' is none of pilot, security, dual"):
        select("other")
