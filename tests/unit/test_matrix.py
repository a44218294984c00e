"""What the matrix expects of its cases."""

import pytest

from tests.lab.node import REPOSITORY
from tests.matrix.bed import Outcome, Result
from tests.matrix.cases import Case, cases
from tests.matrix.software import SOFTWARE
from tests.node.test_matrix import CUT


def case(name: str) -> Case:
    (found,) = cases([name])
    return found


def result(outcome: Outcome = Outcome.RIGHT, redirected: int = 1, handshakes: int = 0) -> Result:
    return Result(outcome, 1000, redirected, handshakes, "" if outcome is Outcome.RIGHT else f"it was {outcome}")


def allowed(name: str) -> set[Outcome]:
    handshakes = int(case(name).way.is_mutual)
    return {each for each in Outcome if not case(name).verdict(result(each, handshakes=handshakes))}


def test_bytes_are_right_wherever_no_row_says_otherwise() -> None:
    assert allowed("postgres/mtls/full") == allowed("tokio/plain/proxy") == {Outcome.RIGHT}


def test_who_takes_a_short_read_for_all_may_hang_at_full_but_gets_no_wrong_bytes() -> None:
    assert allowed("tokio/plain/full") == {Outcome.RIGHT, Outcome.HUNG}


def test_a_connection_may_have_begun_where_the_changing_level_was_off() -> None:
    assert not case("redis/plain/changing").verdict(result(redirected=0))
    assert allowed("redis/plain/changing") == {Outcome.RIGHT}
    assert allowed("tokio/plain/changing") == {Outcome.RIGHT, Outcome.HUNG}


def test_who_splices_cannot_do_so_at_full() -> None:
    assert Outcome.RIGHT not in allowed("go-copy/mtls/full")
    assert allowed("go-copy/mtls/proxy") == {Outcome.RIGHT}


@pytest.mark.parametrize(("level", "redirected"), [("off", 1), ("proxy", 0), ("full", 0)])
def test_a_level_at_which_nothing_or_something_was_redirected_is_not_that_level(level: str, redirected: int) -> None:
    assert case(f"redis/plain/{level}").verdict(result(redirected=redirected))
    assert not case(f"redis/plain/{level}").verdict(result(redirected=1 - redirected))


@pytest.mark.parametrize(("way", "handshakes"), [("mtls", 0), ("plain", 1)])
def test_bytes_that_go_past_mtls_or_unexpectedly_by_it_are_not_that_way(way: str, handshakes: int) -> None:
    assert case(f"redis/{way}/full").verdict(result(handshakes=handshakes))
    assert not case(f"redis/{way}/full").verdict(result(handshakes=1 - handshakes))


def test_what_is_unexpected_is_said_with_its_reason() -> None:
    assert case("redis/plain/off").line(result(Outcome.HUNG, 0)) == "redis/plain/off: UNEXPECTED: hung: it was hung"
    line = case("tokio/first/full").line(result(Outcome.HUNG))
    assert line.endswith("hung, as docs/acceleration.md says: a read that returns less than it could")


def test_the_rows_that_are_quoted_are_in_the_table() -> None:
    rows = (REPOSITORY / "docs" / "acceleration.md").read_text().splitlines()
    quoted = {each.at_full.row for each in SOFTWARE.values() if each.at_full}
    assert quoted and all(any(row.startswith(f"| {words} |") for row in rows) for words in quoted)


def test_the_quick_cut_needs_no_package_of_the_matrix() -> None:
    for name in CUT:
        software = SOFTWARE[name.partition("/")[0]]
        assert set(software.compiled) <= {"java"} and not software.at_full
        assert cases([f"{name}/*"])
