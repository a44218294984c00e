"""The table of docs/acceleration.md: what an application at level full notices, row by row, on this kernel."""

import json
import subprocess
import sys
from typing import Any

import pytest

from bpf.kernel import cgroup2_root
from installer.scratch import scratch_cgroup
from tests.lab.machine import acceleration_needed
from tests.lab.node import REPOSITORY

PAGE = REPOSITORY / "docs" / "acceleration.md"
HEADING = "## What an application notices at `full`\n"
# The table's rows, and the tests that hold them: a case of this file, or else a file and a test in it.
HELD_BY = {
    "`splice(2)` from the socket": ("spliced", "node/test_applications.py::test_haproxy_that_splices_is_not_for_full"),
    "`ioctl(FIONREAD)`": ("available", "node/test_applications.py::test_java_asks_what_is_available"),
    "a read that returns less than it could": ("short read", "node/test_applications.py::test_nginx"),
    "`MSG_PEEK` after the first bytes have been read": ("peeked",),
    "`recv()` with `MSG_TRUNC`": ("truncated", "thrown_away"),
    "`SO_PEEK_OFF` (TCP has it since 6.9)": ("peek_offset",),
    "`TCP_INQ`": ("bytes_left",),
    "`SO_TIMESTAMP` and its kin": ("timestamp",),
    "`SO_RCVLOWAT`": ("low_water",),
    "`MSG_ZEROCOPY`": ("zero_copy",),
    "`MSG_OOB`": ("urgent",),
    "a blocking recv()": ("reset",),
    "close() with unread redirected data": ("close_unread", "node/test_ends.py::test_unread_bytes_end_in_a_reset"),
    "`TCP_INFO`, `SIOCOUTQ`, ss(8)": ("tcp_info", "unsent"),
    "tcpdump(8)": ("on_the_wire",),
}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    with acceleration_needed(), scratch_cgroup(cgroup2_root()) as cgroup:
        argv = [sys.executable, "-m", "tests.datapath.applying", str(cgroup)]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_row_of_the_table_is_held_by_a_test(seen: dict[str, Any]) -> None:
    table = PAGE.read_text().partition(HEADING)[2].partition("\n|")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ")[0] for line in table.splitlines()[2:]]
    assert rows == list(HELD_BY)
    for test in (each for tests in HELD_BY.values() for each in tests):
        file, _, name = test.partition("::")
        assert f"def {name}" in (REPOSITORY / "tests" / file).read_text() if name else test in seen, test


@pytest.mark.parametrize(
    ("case", "over_tcp", "at_full"),
    [
        ("reset", ["ECONNRESET", "b''"], ["EAGAIN", "ECONNRESET"]),
        ("low_water", False, True),
        ("zero_copy", True, False),
        ("tcp_info", 1000, 0),
        ("unsent", True, False),
        ("close_unread", "reset", "end"),
        ("spliced", 1000, "EAGAIN"),
        ("urgent", "az", "a!z"),
        ("truncated", False, True),
        ("thrown_away", 10, "EFAULT"),
        ("bytes_left", True, False),
        ("timestamp", True, False),
        ("on_the_wire", True, False),
    ],
)
def test_an_application_notices_what_the_table_says(
    seen: dict[str, Any], case: str, over_tcp: object, at_full: object
) -> None:
    assert seen[case] == [over_tcp, at_full]


def test_a_peek_offset_is_ignored_for_redirected_data(seen: dict[str, Any]) -> None:
    assert seen["peek_offset"] in ([100, 0], ["the kernel lacks it"] * 2)


def test_a_peek_sees_redirected_bytes_or_those_of_tcp(seen: dict[str, Any]) -> None:
    assert seen["peeked"] == [2000, 1000]


def test_bytes_by_tcp_behind_redirected_ones_have_no_edge_of_their_own(seen: dict[str, Any]) -> None:
    assert seen["short read"] == {"edges": [True, False], "sizes": [1000, 1000]}


def test_fionread_counts_one_kind_of_bytes_or_both(seen: dict[str, Any]) -> None:
    assert seen["available"] in ([0, 1000], [1000, 0], [1000, 1000])  # which, depends on the kernel


@pytest.mark.parametrize("how", ["wait for all", "low water"])
def test_a_reader_that_tcp_has_put_to_sleep_gets_everything_in_order(seen: dict[str, Any], how: str) -> None:
    assert seen[how] == {"stuck": False, "whole": True, "redirected": 0}


def test_only_a_reader_that_does_not_block_is_redirected_to_again(seen: dict[str, Any]) -> None:
    assert seen["returning"] == {"blocking": 0, "not blocking": 10}


def test_small_messages_pass_only_where_there_are_many(seen: dict[str, Any]) -> None:
    queued = seen["queued"]
    assert (queued["tail redirected"], queued["tail over budget"]) == (3, 0)
    assert (queued["early redirected"], queued["early over budget"]) == (10, 0)  # whoever peeks, peeks here
    assert (queued["body redirected"], queued["body over budget"]) == (1, 0)
    # four in a row are redirected; then one is sent to TCP, where the others follow it
    assert (queued["late redirected"], queued["late over budget"]) == (4, 1)


def test_early_small_messages_are_not_without_limit(seen: dict[str, Any]) -> None:
    assert seen["crowded"] == {"redirected": 256, "over budget": 1}  # what was read before does not count
