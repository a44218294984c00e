"""Programs attached at several cgroups: pods of each are captured, and upkeep treats all of them alike."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bpf import attachment
from bpf.attachment import (
    Outcome,
    attach_also,
    attach_programs,
    attached_cgroups,
    detach_programs,
    is_attached,
    is_deciding,
    places_of,
)
from bpf.errors import NotAttached
from bpf.kernel import cgroup2_root
from bpf.loading import load_and_pin
from bpf.pins import Pins
from bpf.places import further_places
from tests.datapath.test_killed import Compiled
from tests.datapath.wires import Kernel, Namespace, Wire, fresh_kernel, scratch_pins


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """Programs and maps for these tests alone: they move. They are compiled once more, for all swaps."""
    with fresh_kernel() as made, pytest.MonkeyPatch.context() as patch:
        again = Compiled(made.pins.maps, made.pins.bpffs / "again")
        again.programs.mkdir()
        load_and_pin(again.maps, again.programs)
        patch.setattr(attachment, "load_and_pin", again.pin)
        yield made
        shutil.rmtree(again.programs)


@dataclass(frozen=True)
class Tree:
    """A cgroup of the test's own, with two below it."""

    top: Path
    first: Path
    second: Path

    @property
    def ids(self) -> list[int]:
        return [each.stat().st_ino for each in (self.top, self.first, self.second)]


@pytest.fixture
def tree() -> Iterator[Tree]:
    with scratch_pins() as (_, top):
        made = Tree(top, top / "kubepods.slice", top / "second")
        made.first.mkdir()
        made.second.mkdir()
        try:
            yield made
        finally:
            for each in (made.first, made.second):
                if each.exists():
                    each.rmdir()


@pytest.fixture
def pins(kernel: Kernel, tree: Tree) -> Iterator[Pins]:
    """Attached at the tree's first cgroup."""
    attach_programs(kernel.pins, tree.first)
    yield kernel.pins
    attach_programs(kernel.pins, kernel.cgroup)
    for directory in further_places(kernel.pins).values():
        shutil.rmtree(directory)


def inside(wire: Wire, cgroup: Path) -> Namespace:
    """The wire's pod, whose processes are in this cgroup."""
    return replace(wire.pod, cgroup=cgroup, started=[])


def is_captured(wire: Wire, cgroup: Path) -> bool:
    who = [inside(wire, cgroup).dial(ip, 8080).get("who") for ip in (wire.peer.ip4, wire.peer.ip6)]
    assert who in (["outbound"] * 2, ["remote"] * 2)
    return who == ["outbound"] * 2


def serve(wire: Wire, cgroup: Path) -> Namespace:
    """A pod with its proxy in this cgroup, and something at the other end."""
    wire.enrol()
    proxys = inside(wire, cgroup)
    proxys.serve("outbound", "15001", uid=1337)
    wire.peer.serve("remote", "8080", uid=0)
    return proxys


def test_a_pod_is_captured_at_each_place_before_and_after_a_swap(
    pins: Pins, tree: Tree, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxys = serve(wire, tree.first)
    try:
        assert not is_captured(wire, tree.second)
        assert attach_also(pins, tree.second)
        assert not attach_also(pins, tree.second)
        _, first, second = tree.ids
        assert attached_cgroups(pins) == {first, second}
        assert [is_captured(wire, each) for each in (tree.first, tree.second)] == [True, True]
        monkeypatch.setattr(attachment, "sources_digest", lambda: bytes(32))
        assert attach_programs(pins, tree.first) is Outcome.SWAPPED
        assert attach_programs(pins, tree.first) is Outcome.UNCHANGED
        assert [is_captured(wire, each) for each in (tree.first, tree.second)] == [True, True]
        assert places_of(pins) == [tree.first, tree.second]
    finally:
        proxys.stop()


def test_a_link_that_a_further_place_has_lost_is_missed_and_comes_back(pins: Pins, tree: Tree, wire: Wire) -> None:
    proxys = serve(wire, tree.first)
    try:
        attach_also(pins, tree.second)
        (further_places(pins)[tree.second] / "connect4").unlink()
        assert not is_attached(pins)
        assert not is_deciding(pins)
        assert attached_cgroups(pins) == {tree.ids[1]}
        assert attach_programs(pins, tree.first) is Outcome.SWAPPED
        assert is_attached(pins)
        assert is_captured(wire, tree.second)
    finally:
        proxys.stop()


def test_a_further_cgroup_that_has_gone_lacks_nothing_and_counts_again_when_it_is_back(pins: Pins, tree: Tree) -> None:
    attach_also(pins, tree.second)
    tree.second.rmdir()
    assert is_attached(pins)
    assert is_deciding(pins)
    assert places_of(pins) == [tree.first]
    tree.second.mkdir()
    assert not is_attached(pins)
    assert attach_programs(pins, tree.first) is Outcome.SWAPPED
    assert attached_cgroups(pins) == set(tree.ids[1:])
    tree.second.rmdir()
    assert attach_programs(pins, tree.top) is Outcome.SWAPPED
    assert not further_places(pins)


@pytest.mark.parametrize("is_first_below", [True, False])
def test_a_place_above_others_takes_over_from_them(pins: Pins, tree: Tree, wire: Wire, is_first_below: bool) -> None:
    """Never two of them for one process: each connection would be counted twice."""
    beside = tree.top.with_name(f"{tree.top.name}-beside")
    beside.mkdir()
    try:
        if not is_first_below:
            attach_programs(pins, beside)
            attach_also(pins, tree.first)
        attach_also(pins, tree.second)
        assert attach_also(pins, tree.top)
        wanted = [tree.top] if is_first_below else [beside, tree.top]
        assert places_of(pins) == wanted
        assert attached_cgroups(pins) == {each.stat().st_ino for each in wanted}
        assert is_attached(pins)
        proxys = serve(wire, tree.first)
        before = wire.kernel.tables.connection_totals()["outbound", "captured"]
        assert is_captured(wire, tree.second)
        proxys.stop()
        assert wire.kernel.tables.connection_totals()["outbound", "captured"] == before + 2
        assert attach_programs(pins, wanted[0]) is Outcome.UNCHANGED
    finally:
        attach_programs(pins, tree.top)
        beside.rmdir()


def test_the_root_is_a_place_like_any_other(pins: Pins) -> None:
    assert attach_also(pins, cgroup2_root())
    assert places_of(pins) == [cgroup2_root()]
    assert is_attached(pins)


def test_detaching_detaches_everywhere(tree: Tree) -> None:
    with scratch_pins() as (pins, cgroup), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attachment, "load_and_pin", load_and_pin)
        with pytest.raises(NotAttached, match="run `sidestep attach`"):
            attach_also(pins, cgroup)
        attach_programs(pins, tree.first)
        attach_also(pins, tree.second)
        assert detach_programs(pins)
        assert not attached_cgroups(pins)
        assert not pins.top.exists()
