"""What `make kernels` concludes from transfers to containers with little memory."""

from tests.kernels.limits import Fate, table, worse_than_tcp
from tests.lab.late import CONNECTIONS

WHOLE, CUT = (CONNECTIONS, 0), (7, 1)


def fates(mib: int, off: tuple[int, int], full: tuple[int, int]) -> list[Fate]:
    return [Fate("application", mib, "off", *off), Fate("application", mib, "full", *full)]


def test_what_plain_tcp_does_not_lose_may_not_be_lost() -> None:
    assert worse_than_tcp(fates(16, WHOLE, WHOLE)) == []
    assert worse_than_tcp(fates(16, WHOLE, CUT)) == ["application with 16 MiB at full: 7 of 40, killed"]
    assert worse_than_tcp(fates(16, WHOLE, (39, 0))) == ["application with 16 MiB at full: 39 of 40"]


def test_where_plain_tcp_loses_too_nothing_is_concluded() -> None:
    assert worse_than_tcp(fates(16, CUT, CUT)) == []
    assert worse_than_tcp(fates(16, WHOLE, CUT) + fates(16, CUT, WHOLE)) == []  # another try


def test_nothing_is_concluded_where_tcps_own_buffers_may_not_fit() -> None:
    assert worse_than_tcp(fates(10, WHOLE, CUT)) == []


def test_tries_are_summed_up_by_level() -> None:
    rows = list(table(fates(16, WHOLE, CUT) + fates(16, WHOLE, WHOLE)))
    assert rows == ["| application | 16 | 80 of 80 | as `off` | 47 of 80, killed 1 of 2 |"]
