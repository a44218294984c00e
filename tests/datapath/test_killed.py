"""Killed at every step of putting the programs up, exchanging them, moving them and taking them down.

A child does the work; wrappers around the calls that change anything kill it with SIGKILL before the n-th of them. The
next start has to make everything whole, the next uninstall has to finish, and nothing may be left over. The programs
are compiled once: what is killed pins copies of them, one by one, as the loader does.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bpf import attachment, syscalls, takeover
from bpf.attachment import (
    Outcome,
    attach_also,
    attach_programs,
    attached_cgroups,
    detach_programs,
    is_attached,
)
from bpf.hooks import CGROUP_HOOKS, MESSAGE_HOOK
from bpf.links import instances, link_pod
from bpf.loading import load_and_pin
from bpf.pins import LAYOUT, Pins
from bpf.steering import load_instance, opened
from bpf.syscalls import Descriptor, attached_to
from tests.datapath.wires import Wire, scratch_pins
from tests.lab.waiting import wait_until

# whatever changes something on the bpffs or in the kernel
STEPS = (
    *((os, name) for name in ("mkdir", "rename", "unlink", "rmdir")),
    *((syscalls, name) for name in ("pin", "create_link", "update_link", "attach_to_map", "map_update")),
)
COOKIE = 4711  # of a pod that has a link and nothing else


@dataclass(frozen=True)
class Compiled:
    """Programs and maps that are there already, in place of a compiler."""

    maps: Path
    programs: Path

    def pin(self, maps: Path, programs: Path) -> list[str]:
        """As load_and_pin(): maps that are there are used, the others made, and programs pinned."""
        for source, target in ((self.maps, maps), (self.programs, programs)):
            for path in sorted(source.iterdir()):
                if not (target / path.name).exists():
                    with Descriptor(syscalls.open_pin(path)) as found:
                        syscalls.pin(found.fd, target / path.name)
        return []


@dataclass(frozen=True)
class World:
    """Where programs are put up; `versions` of the same sources, for the same maps."""

    pins: Pins
    cgroup: Path
    versions: tuple[Compiled, Compiled]

    def choose(self, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on the sources are those of this version."""
        monkeypatch.setattr(attachment, "load_and_pin", self.versions[version].pin)
        monkeypatch.setattr(attachment, "sources_digest", lambda: bytes([version]) * 32)

    def attached(self) -> dict[str, list[int]]:
        """The ids of the programs of each hook of the cgroup."""
        with Descriptor(os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            return {hook.name: list(attached_to(directory.fd, hook.attach_type).programs) for hook in CGROUP_HOOKS}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with scratch_pins() as (pins, cgroup):
        versions = []
        for name in ("one", "two"):
            made = Compiled(pins.bpffs / "maps", pins.bpffs / name)
            for directory in (made.maps, made.programs):
                directory.mkdir(exist_ok=True)
            load_and_pin(made.maps, made.programs)
            versions.append(made)
        yield World(pins, cgroup, (versions[0], versions[1]))


@pytest.fixture
def netns() -> Iterator[int]:
    """A network namespace of no pod."""
    asleep = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
    assert asleep.stdout is not None
    asleep.stdout.readline()
    try:
        with Descriptor(os.open(f"/proc/{asleep.pid}/ns/net", os.O_RDONLY)) as opened:
            yield opened.fd
    finally:
        asleep.kill()
        asleep.communicate()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is on its way to a proxy."""
    monkeypatch.setattr(takeover, "ON_THE_WAY", 0)


def killed_before(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that dies before its n-th step; whether it had so many."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **options)

            return call

        for module, name in STEPS:
            setattr(module, name, dying(getattr(module, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def killed_everywhere(work: Callable[[], object], prepare: Callable[[], object], at_least: int) -> Iterator[int]:
    """Yields the step's number after each kill; ends with the first run that gets through."""
    for number in range(1000):
        prepare()
        if not killed_before(number, work):
            assert number >= at_least
            return
        yield number


def assert_whole(world: World, pods: int = 0) -> None:
    """One program of one version on each hook, each linked once, and nothing besides."""
    pins = world.pins
    assert is_attached(pins)
    assert [path.name for path in pins.top.iterdir()] == [LAYOUT]
    programs = {path.name: id_of(path) for path in pins.programs.iterdir()}
    assert {path.name for path in pins.links.iterdir()} == {hook.name for hook in CGROUP_HOOKS}
    for hook in CGROUP_HOOKS:
        assert linked(pins.links / hook.name) == programs[hook.name]
    # the kernel takes a link down some time after its last pin
    wait_until(
        lambda: world.attached() == {hook.name: [programs[hook.name]] for hook in CGROUP_HOOKS}, "one program a hook"
    )
    assert [is_current for _, is_current in instances(pins)] == [True] * pods
    if MESSAGE_HOOK.name in programs:
        with Descriptor(pins.open_map("accelerated")) as sockets:
            assert list(attached_to(sockets.fd, MESSAGE_HOOK.attach_type).programs) == [programs[MESSAGE_HOOK.name]]


def id_of(program: Path) -> int:
    with Descriptor(syscalls.open_pin(program)) as opened:
        return int(syscalls.program_info(opened.fd).id)


def linked(link: Path) -> int:
    with Descriptor(syscalls.open_pin(link)) as opened:
        return int(syscalls.link_info(opened.fd).prog_id)


def test_killed_while_it_attaches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        world.choose(1, monkeypatch)  # whose program the socket hash keeps, as it is the same for both
        attach_programs(world.pins, world.cgroup)
        detach_programs(world.pins)
        world.choose(0, monkeypatch)

    for _ in killed_everywhere(lambda: attach_programs(world.pins, world.cgroup), nothing, at_least=6 + 13 + 13 + 13):
        if not world.pins.root.exists():  # a half is no capture at all, which an uninstall takes for nothing too
            assert not is_attached(world.pins)
        attach_programs(world.pins, world.cgroup)
        assert_whole(world)


def steer(pins: Pins, netns: int) -> None:
    with opened(pins) as maps, Descriptor(load_instance(maps, COOKIE)) as instance:
        link_pod(pins, COOKIE, netns, instance.fd)


def test_killed_while_it_swaps(world: World, netns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> None:
        world.choose(0, monkeypatch)
        attach_programs(world.pins, world.cgroup)
        world.choose(1, monkeypatch)

    detach_programs(world.pins)
    old()
    steer(world.pins, netns)
    for _ in killed_everywhere(lambda: attach_programs(world.pins, world.cgroup), old, at_least=13 + 13 + 1 + 13):
        assert all(world.attached().values())
        assert attach_programs(world.pins, world.cgroup) is not Outcome.ATTACHED
        assert_whole(world, pods=1)
        assert linked(world.pins.links / "connect4") == id_of(world.versions[1].programs / "connect4")


def test_killed_while_it_swaps_connections_are_captured_then_and_after_the_next_start(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.mesh()
    pins, cgroup = wire.kernel.pins, wire.kernel.cgroup
    other = Compiled(pins.maps, pins.bpffs / "other")
    other.programs.mkdir()
    try:
        load_and_pin(other.maps, other.programs)
        monkeypatch.setattr(attachment, "load_and_pin", other.pin)
        for number in range(3, 1000, 9):
            monkeypatch.setattr(attachment, "sources_digest", lambda number=number: number.to_bytes(32, "big"))
            was_killed = killed_before(number, lambda: attach_programs(pins, cgroup))
            for _ in ("then", "after the next start"):
                assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
                assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "inbound"
                attach_programs(pins, cgroup)
            if not was_killed:
                break
    finally:
        shutil.rmtree(other.programs)
        monkeypatch.undo()
        assert attach_programs(pins, cgroup) is Outcome.SWAPPED


def test_killed_while_links_move(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.choose(0, monkeypatch)
    outer, inner = world.cgroup, world.cgroup / "inner"
    inner.mkdir()
    there = World(world.pins, inner, world.versions)
    detach_programs(world.pins)
    try:
        for _ in killed_everywhere(
            lambda: attach_programs(world.pins, inner), lambda: attach_programs(world.pins, outer), at_least=13 * 3
        ):
            captured = {name for place in (world, there) for name, ids in place.attached().items() if ids}
            assert captured == {hook.name for hook in CGROUP_HOOKS}
            attach_programs(world.pins, inner)
            assert_whole(there)
            wait_until(lambda: not any(world.attached().values()), "the former links to go")
    finally:
        detach_programs(world.pins)
        inner.rmdir()


@pytest.mark.parametrize("further", ["beside", "above"])
def test_killed_while_it_attaches_at_a_further_cgroup(
    world: World, further: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.choose(0, monkeypatch)
    first, beside = world.cgroup / "first", world.cgroup / "beside"
    for each in (first, beside):
        each.mkdir()
    place = {"beside": beside, "above": world.cgroup}[further]
    detach_programs(world.pins)

    def one() -> None:
        attach_programs(world.pins, first)
        shutil.rmtree(world.pins.places, ignore_errors=True)

    try:
        for _ in killed_everywhere(lambda: attach_also(world.pins, place), one, at_least=13 * 2):
            attach_programs(world.pins, first)
            attach_also(world.pins, place)
            assert is_attached(world.pins)
            wanted = {first, beside} if further == "beside" else {world.cgroup}
            assert attached_cgroups(world.pins) == {each.stat().st_ino for each in wanted}
            assert [path.name for path in world.pins.top.iterdir()] == [LAYOUT]
    finally:
        detach_programs(world.pins)
        for each in (first, beside):
            each.rmdir()


def taken_down(world: World, netns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    def up() -> None:
        attach_programs(world.pins, world.cgroup)
        with suppress(FileExistsError):
            steer(world.pins, netns)

    world.choose(0, monkeypatch)
    detach_programs(world.pins)
    yield from killed_everywhere(lambda: detach_programs(world.pins), up, at_least=1 + 13 + 13 + 20)


def test_killed_while_it_detaches_the_next_start_attaches_again(
    world: World, netns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in taken_down(world, netns, monkeypatch):
        attach_programs(world.pins, world.cgroup)
        assert_whole(world, pods=len(list(world.pins.netns.iterdir())))


def test_killed_while_it_detaches_the_next_uninstall_finishes(
    world: World, netns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in taken_down(world, netns, monkeypatch):
        assert detach_programs(world.pins)
        assert not world.pins.top.exists()
        wait_until(lambda: not any(world.attached().values()), "the links to go")
        assert not detach_programs(world.pins)
