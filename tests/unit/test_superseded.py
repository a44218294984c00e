"""When the rows of old policies go: not before the programs are through that may be at work with them."""

import os
import platform

import pytest

from bpf.grace import wait_for_programs
from cni.enrolment import superseded
from cni.enrolment.superseded import Key, Superseded

ONE, OTHER = ("port_rules", b"1"), ("networks", b"2")


def dropped(from_: Superseded) -> set[Key]:
    found: set[Key] = set()
    from_.drop_with(found.update)
    return found


def test_the_kernel_says_when_programs_are_through() -> None:
    can_say = platform.machine() in ("x86_64", "aarch64") and os.sysconf("SC_NPROCESSORS_ONLN") > 1
    assert wait_for_programs() is can_say


def test_all_rows_go_when_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superseded, "wait_for_programs", lambda: True)
    rows = Superseded()
    rows.add([ONE])
    rows.add([OTHER])
    assert dropped(rows) == {ONE, OTHER}
    assert dropped(rows) == set()


def test_where_it_does_not_say_so_rows_go_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superseded, "wait_for_programs", lambda: False)
    rows = Superseded()
    rows.add([ONE])
    assert dropped(rows) == set()
    monkeypatch.setattr(superseded, "_LONG", 0.0)
    assert dropped(rows) == {ONE}


def test_nobody_waits_if_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(superseded, "wait_for_programs")
    rows = Superseded()
    rows.add([])
    assert dropped(rows) == set()
