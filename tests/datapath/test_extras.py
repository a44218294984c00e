"""Kernels that lack an extra: pods are captured, and the probe and the status say what is done without it.

This kernel has all of them, so tests leave some out.
"""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bpf import compiler
from bpf.acceleration import is_possible
from bpf.attachment import Outcome, attach_programs
from bpf.extras import EXTRAS, VARIABLE
from bpf.layout import LISTENER_SLOTS, BuildEntry
from bpf.pins import Pins
from bpf.tables import entries
from cni.enrolment.hearing import Hearing
from installer.commands.status.status_document import status_of
from installer.probe.loading import loading
from installer.settings import Attachment
from tests.datapath.adopting import parts, running
from tests.datapath.wires import Wire, scratch_pins
from tests.lab.sources import changed_copy

REPOSITORY = Path(__file__).parents[2]
EVERY = ",".join(each.name for each in EXTRAS)


@pytest.fixture
def again(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Attaches again, on a kernel that lacks some extras; at the end, on this one."""
    kernel = wire.kernel

    def again(lacking: str) -> Outcome:
        monkeypatch.setenv(VARIABLE, lacking)
        return attach_programs(kernel.pins, kernel.cgroup)

    yield again
    monkeypatch.undo()
    attach_programs(kernel.pins, kernel.cgroup)


def recorded(pins: Pins) -> list[str]:
    ((_, build),) = entries(pins, "build")
    assert isinstance(build, BuildEntry)
    return build.extras_lacking


def sidestep(lacking: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "installer", *map(str, argv)]
    environment = {**os.environ, VARIABLE: lacking}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("lacking", [*(each.name for each in EXTRAS), EVERY])
def test_pods_are_captured_without_extras(wire: Wire, again: Any, lacking: str) -> None:
    wire.mesh()
    assert again(lacking) is Outcome.SWAPPED
    assert recorded(wire.kernel.pins) == lacking.split(",")
    for outside, inside in ((wire.peer.ip4, wire.pod.ip4), (wire.peer.ip6, wire.pod.ip6)):
        seen = wire.pod.dial(outside, 8080)
        assert (seen["who"], seen["original"]) == ("outbound", [str(outside), 8080])
        seen = wire.peer.dial(inside, 8080)
        assert (seen["who"], seen["original"]) == ("inbound", [str(inside), 8080])


def test_programs_are_swapped_only_if_the_extras_left_out_are_others(wire: Wire, again: Any) -> None:
    assert again("caller,iterator") is Outcome.SWAPPED
    assert again("iterator, caller") is Outcome.UNCHANGED
    assert again("iterator") is Outcome.SWAPPED
    assert recorded(wire.kernel.pins) == ["iterator"]
    assert again("") is Outcome.SWAPPED
    assert recorded(wire.kernel.pins) == []


def test_without_acceleration_its_program_goes_and_comes_back(wire: Wire, again: Any) -> None:
    assert is_possible(wire.kernel.pins)
    again("acceleration")
    assert not is_possible(wire.kernel.pins)
    again("")
    assert is_possible(wire.kernel.pins)


def test_without_the_iterator_listeners_are_found_in_processes(wire: Wire, again: Any) -> None:
    again("iterator")
    kernel = wire.kernel
    with closing(Hearing(kernel.enrolments, kernel.pins)) as hearing:
        assert hearing.needs_processes
    again("")
    with closing(Hearing(kernel.enrolments, kernel.pins)) as hearing:
        assert not hearing.needs_processes


def test_a_kernel_whose_iterator_holds_the_lock_stores_nothing_and_processes_are_asked(
    wire: Wire, again: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To store a socket whose lock the iterator holds would hang such a kernel."""
    line = "    return read32((__u64)sk, SOCK_OWNED);"
    monkeypatch.setattr(
        compiler, "HERE", changed_copy(tmp_path / "changed", "iterator.c", line, "    return false;") / "bpf"
    )
    assert again("") is Outcome.SWAPPED
    with running(wire) as pod, parts(wire.kernel) as agent:
        pod.serve("inbound", "15006x2")
        outcome = agent.adopt(pod.pod(pod.proxy))
        assert outcome is not None
        assert (outcome.problem, outcome.listeners) == ("", LISTENER_SLOTS)
        assert agent.hearing.needs_processes
        assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "inbound"


def test_the_status_document_has_what_is_lost(wire: Wire, again: Any) -> None:
    again("caller")
    assert status_of(wire.kernel.pins)["lacking"] == {"caller": "the events of a trace do not name the calling process"}


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda each: each.name)
def test_the_probe_says_what_is_lost(extra: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_pins() as (pins, _):
        monkeypatch.setenv(VARIABLE, extra.name)
        programs, row = loading(Attachment(pins.bpffs))
    assert (programs.verdict, row.verdict) == ("yes", "warning")
    assert (row.what, row.needed_by) == (extra.name, extra.needed_by)
    assert row.found == f"not there: left out by {VARIABLE}"
    assert row.advice == f"without it, {extra.without}; Linux {extra.since}, or newer, has it"


def test_the_status_says_what_is_lost() -> None:
    with scratch_pins() as (pins, cgroup):
        options = ("--bpffs", pins.bpffs)
        assert sidestep("ingress_ifindex", "attach", *options, "--cgroup", cgroup).returncode == 0
        without = "a connection counts as arriving on the interface that has its destination address"
        assert f"kernel: without ingress_ifindex: {without}" in sidestep("", "status", *options).stdout.splitlines()


@pytest.mark.parametrize("command", ["attach", "probe"])
def test_an_extra_that_does_not_exist_is_told_in_one_line(command: str) -> None:
    with scratch_pins() as (pins, cgroup):
        done = sidestep("iterator,ingress", command, "--bpffs", pins.bpffs, "--cgroup", cgroup)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f'{VARIABLE}: "ingress" is not an extra; give some of ingress_ifindex,' in done.stderr
