"""Somebody is killed in the middle of a transfer: how the others' connections end, as docs/acceleration.md says."""

from collections.abc import Iterator

import pytest

from bpf.layout import LEVELS
from tests.ends.cutting import Moment, Transfers, Victim, transfers
from tests.lab.machine import acceleration_needed

KILLS = 20
# By whom is killed with bytes unread, the lowest level at which these bytes were redirected: from there on the kernel
# does not count them, and the other end sees an orderly end. Below, it sees a reset.
REDIRECTED_FROM = {Victim.WRITERS_PROXY: "full", Victim.READERS_PROXY: "proxy", Victim.READER: "full"}


@pytest.fixture(scope="module")
def cut() -> Iterator[Transfers]:
    with acceleration_needed(), transfers(seed=1) as running:
        yield running


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_killed_application_has_written_arrives(cut: Transfers, level: str) -> None:
    assert set(cut.cut(Victim.WRITER, Moment.FLOWING, level, KILLS).reader) == {"all"}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("victim", REDIRECTED_FROM)
def test_unread_bytes_end_in_a_reset_unless_they_were_redirected(cut: Transfers, victim: Victim, level: str) -> None:
    is_redirected = list(LEVELS).index(level) >= list(LEVELS).index(REDIRECTED_FROM[victim])
    found = cut.cut(victim, Moment.UNREAD, level, KILLS)
    assert set(found.writer) == {"end" if is_redirected else "reset"}
    assert set(found.reader) <= {"end"}  # the same at each level: less than was written, and an orderly end


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("victim", REDIRECTED_FROM)
def test_no_connection_hangs_or_has_wrong_bytes_after_a_kill(cut: Transfers, victim: Victim, level: str) -> None:
    found = cut.cut(victim, Moment.FLOWING, level, KILLS)
    # a writer that writes once more before it has seen the end or the reset gets EPIPE
    assert set(found.writer) <= {"reset", "end", "broken pipe"}
    assert set(found.reader) <= {"end", "all"}
