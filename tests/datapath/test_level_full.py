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


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    with acceleration_needed(), scratch_cgroup(cgroup2_root()) as cgroup:
        argv = [sys.executable, "-m", "tests.datapath.applying", str(cgroup)]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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
    ],
)
def test_an_application_notices_what_the_table_says(
    seen: dict[str, Any], case: str, over_tcp: object, at_full: object
) -> None:
    assert seen[case] == [over_tcp, at_full]


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
    assert seen["crowded"] == {"redirected": 255, "over budget": 1}  # the one that began the connection counts
