"""The verdicts of `make cluster`: what counts as expected, and what is said of the rest."""

from threading import Barrier

import pytest

from tests.cluster.checks import Check, at_once, is_as_expected, soon, wrong_with
from tests.cluster.host import CommandFailed
from tests.cluster.pods import PodName, Reply

SERVER = PodName("mesh", "near")
NAMED = Reply("near", {"HTTP_X_FORWARDED_CLIENT_CERT": "By=spiffe://b;URI=spiffe://a"})


def failing() -> str:
    raise CommandFailed("node-1: ctr version: no such socket")


def test_each_check_is_said_and_a_failing_look_is_not_as_expected(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("one", str), Check("two", lambda: "3 of 4"), Check("three", failing)]
    assert [is_as_expected(each, "base") for each in checks] == [True, False, False]
    assert capsys.readouterr().out.splitlines() == [
        "base: one: as expected",
        "base: two: NOT as expected: 3 of 4",
        "base: three: NOT as expected: CommandFailed: node-1: ctr version: no such socket",
    ]


def test_an_answer_with_the_identities_that_are_wanted_is_right() -> None:
    assert wrong_with(NAMED, SERVER, ("By=spiffe://b", "URI=spiffe://a")) == ""


def test_an_answer_without_proxies_must_name_nobody() -> None:
    assert wrong_with(Reply("near", {}), SERVER, ()) == ""
    assert "URI=spiffe://a" in wrong_with(NAMED, SERVER, ())


def test_another_identity_is_wrong() -> None:
    assert wrong_with(NAMED, SERVER, ("URI=spiffe://c",)) == "the proxies said By=spiffe://b;URI=spiffe://a"
    assert wrong_with(Reply("near", {}), SERVER, ("URI=spiffe://a",)) == "the proxies said nothing"


def test_another_server_and_no_answer_are_wrong() -> None:
    assert wrong_with(Reply("far", {}), SERVER, ()) == "answered by far"
    assert wrong_with(Reply("", {}, "timed out"), SERVER, ()) == "timed out"
    assert wrong_with(Reply("", {}), SERVER, ()) == "answered by nobody"


def test_checks_that_look_at_once_are_said_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    met = Barrier(2, timeout=10)

    def meet() -> str:
        met.wait()
        return ""

    checks = at_once([Check("one", meet), Check("two", meet), Check("three", failing)])
    assert [is_as_expected(each, "base") for each in checks] == [True, True, False]
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["one", "two", "three"]


def test_what_is_right_soon_is_right_and_else_the_last_answer_is_told() -> None:
    answers = iter(["not yet", "not yet", ""])
    assert soon(lambda: next(answers))() == ""
    assert soon(lambda: "3 of 4", seconds=0.05)() == "3 of 4"
