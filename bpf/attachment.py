"""Attaching the programs: from nothing, not at all when nothing has changed, or in place when the sources have.

Everything is made in a directory of its own and renamed when complete, so a crash leaves either nothing or all of it.
What somebody has taken from that directory is put back without losing what the maps hold: a map lives as long as a
program or a descriptor refers to it, so it is found again through the programs that use it, or the agent's descriptors.
"""

import ctypes
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

from bpf import syscalls
from bpf.acceleration import attach_messages, is_possible
from bpf.compiler import compile_and_pin, sources_digest
from bpf.errors import KernelRefused
from bpf.hooks import CGROUP_HOOKS, HOOKS
from bpf.kernel import require_bpffs, require_capabilities
from bpf.layout import STORAGES, TABLES, BuildEntry, Word
from bpf.pins import OtherVersion, Pins
from bpf.steering import load_instance
from bpf.syscalls import Descriptor

# the programs that capture; the others finish what these have begun
_DECIDING = ("connect4", "connect6", "sendmsg4", "sendmsg6")
# what connections can go on without: those that were accelerated go by TCP from then on
_FORGETTABLE = ("pairings",)
# seconds from connect() to a busy proxy's asking for the original destination
_ON_THE_WAY = 1.0


class Outcome(StrEnum):
    """What an attach had to do."""

    UNCHANGED = "unchanged"
    ATTACHED = "attached"
    SWAPPED = "swapped"


def attach_programs(pins: Pins, cgroup: Path) -> Outcome:
    """Make the programs of this source tree the attached ones, doing as little as possible.

    Same sources and cgroup as last time: nothing is compiled or attached. Other sources: the new programs replace the
    old on their existing links, maps and live connections stay. Raises CompileFailed, KernelRefused, NotAttached.
    """
    require_bpffs(pins.bpffs)
    require_capabilities()
    with _exclusively(pins.bpffs), _of_this_version():
        _clear_leftovers(pins)
        if not pins.root.exists():
            _attach_fresh(pins, cgroup)
            _attach_messages(pins)
            return Outcome.ATTACHED
        repin_maps(pins, {})
        if _recorded(pins) == (sources_digest(), str(cgroup)) and is_attached(pins):
            _attach_messages(pins)  # the last thing that a start does, so a crash may have come before it
            return Outcome.UNCHANGED
        _swap(pins, cgroup)
        _attach_messages(pins)
        return Outcome.SWAPPED


def detach_programs(pins: Pins) -> bool:
    """Remove every link, program and map of ours; False when there was nothing. Live connections go on."""
    require_bpffs(pins.bpffs)
    with _exclusively(pins.bpffs):
        if not pins.top.exists():
            return False
        _stop_deciding(pins)
        # links first: a capture that stops must stop as a whole before its tables go
        for directory in (pins.netns, pins.links):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(pins.top)
        return True


def _stop_deciding(pins: Pins) -> None:
    """Capture nothing more, and wait for what is captured: its proxy has yet to ask where it was to go."""
    steering = list(pins.netns.glob("*"))
    deciding = [path for name in _DECIDING if (path := pins.links / name).exists()]
    for path in (*deciding, *steering):
        path.unlink()
    if steering:
        time.sleep(_ON_THE_WAY)


def is_attached(pins: Pins) -> bool:
    """Whether every map and program is pinned and every global link is still attached to the cgroup it was made for.

    A link outlives its cgroup as an empty shell, so the pin alone says nothing.
    """
    if not pins.root.exists():
        return False
    cgroup = Path(_recorded(pins)[1])
    return (
        all((pins.maps / name).exists() for name in (*TABLES, *STORAGES))
        and all((pins.programs / hook.name).exists() for hook in HOOKS)
        and all(_is_linked(pins.links / hook.name, cgroup) for hook in CGROUP_HOOKS)
    )


def is_deciding(pins: Pins) -> bool:
    """Whether the programs without which connections pass uncaptured are attached: a tenth of is_attached()'s time.

    Those of before do as well, while what somebody has taken is put back and it is not recorded where to.
    """
    recorded = _recorded(pins)[1]
    try:
        wanted = Path(recorded).stat().st_ino if recorded else 0
    except OSError:  # the cgroup has gone
        return False
    found = {_cgroup_of(pins.links / name) for name in _DECIDING}
    return 0 not in found and found <= {wanted or max(found)}


def repin_maps(pins: Pins, held: Mapping[str, int]) -> list[str]:
    """Pin every map again whose pin is missing; returns their names. `held` are open descriptors by name."""
    pins.make_directories()
    missing = [name for name in (*TABLES, *STORAGES) if not (pins.maps / name).exists()]
    for name in missing:
        if name in held:
            syscalls.pin(held[name], pins.maps / name)
    for path in _objects(pins) if missing else ():
        _repin_from(path, pins, missing)
    return [name for name in missing if (pins.maps / name).exists()]


def unpin_others(pins: Pins, held: Mapping[str, int]) -> list[str]:
    """Remove the pins of maps that are not those in `held`; returns their names.

    Whoever detaches and attaches while an agent runs leaves it writing to maps that no program reads. Without the pin
    of `build` the next attach() makes the programs anew, for the maps that are pinned then.
    """
    others = [name for name, fd in held.items() if _pinned_id(pins.maps / name) not in (None, syscalls.map_info(fd).id)]
    for name in [*others, *(["build"] if others else [])]:
        (pins.maps / name).unlink(missing_ok=True)
    return others


def is_pinned(pins: Pins, name: str, held: int) -> bool:
    """Whether the pin of that name is the map of this descriptor."""
    return _pinned_id(pins.maps / name) == int(syscalls.map_info(held).id)


@contextmanager
def _of_this_version() -> Iterator[None]:
    """Whoever attaches is told what makes room for it, which those who only look must not be."""
    try:
        yield
    except OtherVersion as error:
        found = str(error).partition("; ")[0]
        raise OtherVersion(
            f"{found}; run `sidestep detach` and start again: until then nothing of the node's pods is captured"
        ) from error


@contextmanager
def _exclusively(bpffs: Path) -> Iterator[None]:
    """One attach or detach at a time on this bpffs; the lock goes with the process."""
    with Descriptor(os.open(bpffs, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        fcntl.flock(directory.fd, fcntl.LOCK_EX)
        yield


def _attach_messages(pins: Pins) -> None:
    """Acceleration is extra: who can't have it is at level off, which acceleration.py says."""
    if is_possible(pins):
        attach_messages(pins)


def _clear_leftovers(pins: Pins) -> None:
    for leftover in pins.top.glob("new-*") if pins.top.exists() else ():
        shutil.rmtree(leftover)


def _attach_fresh(pins: Pins, cgroup: Path) -> None:
    pins.top.mkdir(mode=0o700, exist_ok=True)
    fresh = pins.top / f"new-{os.getpid()}"
    for name in ("maps", "programs", "links", "netns"):
        (fresh / name).mkdir(parents=True, mode=0o700)
    try:
        compile_and_pin(fresh / "maps", fresh / "programs")
        _link_cgroup(fresh / "programs", fresh / "links", cgroup)
        _record(fresh / "maps", cgroup)
        fresh.rename(pins.root)
    except BaseException:
        shutil.rmtree(fresh)
        with suppress(OSError):  # another version's layout may be there
            pins.top.rmdir()
        raise


def _swap(pins: Pins, cgroup: Path) -> None:
    pins.make_directories()
    _make_way(pins)
    fresh = pins.top / f"new-{os.getpid()}"
    fresh.mkdir(mode=0o700)
    try:
        compile_and_pin(pins.maps, fresh)
        for hook in CGROUP_HOOKS:
            _relink(fresh / hook.name, pins.links / hook.name, hook.attach_type, cgroup)
        for path in pins.netns.iterdir():
            with (
                Descriptor(load_instance(pins, int(path.name))) as steering,
                Descriptor(syscalls.open_pin(path)) as link,
                suppress(KernelRefused),
            ):
                # refused only for a namespace that is gone, whose link is dead anyway
                syscalls.update_link(link.fd, steering.fd, path)
        for program in {path.name for path in pins.programs.iterdir()} - {path.name for path in fresh.iterdir()}:
            (pins.programs / program).unlink()
        for path in list(fresh.iterdir()):
            path.rename(pins.programs / path.name)
        for stale in {p.name for p in pins.links.iterdir()} - {h.name for h in CGROUP_HOOKS}:
            (pins.links / stale).unlink()
        _record(pins.maps, cgroup)
    finally:
        shutil.rmtree(fresh)


def _make_way(pins: Pins) -> None:
    """A map of another shape must not meet the new programs; one that is missing is made anew. Raises OtherVersion."""
    for name in TABLES:
        if (pins.maps / name).exists():
            os.close(pins.open_map(name))
    for name, size in STORAGES.items():
        if (pins.maps / name).exists() and not pins.has_values(name, size):
            if name not in _FORGETTABLE:
                raise OtherVersion(f"{pins.maps / name} is another version's")
            (pins.maps / name).unlink()


def _relink(program: Path, pinned: Path, attach_type: int, cgroup: Path) -> None:
    """Point an existing link at the new program, or make one where there is none on this cgroup.

    A link that moves is made before the old one goes: for a moment both run (connect.c knows), rather than none.
    """
    with Descriptor(syscalls.open_pin(program)) as new:
        if _is_linked(pinned, cgroup):
            with Descriptor(syscalls.open_pin(pinned)) as link:
                syscalls.update_link(link.fd, new.fd, pinned)
            return
        made = _create_cgroup_link(new.fd, cgroup, attach_type)
        with Descriptor(made) as link:
            replacement = program.with_name(f"{program.name}-link")
            syscalls.pin(link.fd, replacement)
            replacement.rename(pinned)


def _is_linked(pinned: Path, cgroup: Path) -> bool:
    """Whether the pinned link is attached to the cgroup that has this path now; its id is the directory's inode."""
    try:
        return _cgroup_of(pinned) == cgroup.stat().st_ino
    except OSError:
        return False


def _cgroup_of(pinned: Path) -> int:
    """Id of the cgroup that a pinned link is attached to; 0 when there is no link, or it is attached to none."""
    try:
        with Descriptor(syscalls.open_pin(pinned)) as link:
            return int(syscalls.link_info(link.fd).cgroup_id)
    except (KernelRefused, OSError):
        return 0


def _link_cgroup(programs: Path, links: Path, cgroup: Path) -> None:
    for hook in CGROUP_HOOKS:
        with Descriptor(syscalls.open_pin(programs / hook.name)) as program:
            made = _create_cgroup_link(program.fd, cgroup, hook.attach_type)
            with Descriptor(made) as link:
                syscalls.pin(link.fd, links / hook.name)


def _create_cgroup_link(program_fd: int, cgroup: Path, attach_type: int) -> int:
    try:
        directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KernelRefused(f"cgroup {cgroup}: {error.strerror}; give a cgroup2 directory") from error
    with Descriptor(directory):
        return syscalls.create_link(program_fd, directory, attach_type, cgroup)


def _record(maps: Path, cgroup: Path) -> None:
    build = BuildEntry((ctypes.c_uint8 * 32)(*sources_digest()), str(cgroup).encode())
    with Descriptor(syscalls.open_pin(maps / "build")) as table:
        if number := syscalls.map_update(table.fd, Word(0), build):
            raise syscalls.refused("bpf_map_update_elem", "build", number)


def _recorded(pins: Pins) -> tuple[bytes, str]:
    build = BuildEntry()
    if not (pins.maps / "build").exists():
        return b"", ""
    with Descriptor(pins.open_map("build")) as table:
        syscalls.map_lookup(table.fd, Word(0), build)
    return bytes(build.sources), build.cgroup.decode()


def _pinned_id(path: Path) -> int | None:
    try:
        with Descriptor(syscalls.open_pin(path)) as pinned:
            return int(syscalls.map_info(pinned.fd).id)
    except KernelRefused:
        return None


def _objects(pins: Pins) -> list[Path]:
    """Whatever may lead to a program: its pin, or that of a link."""
    return [*sorted(pins.programs.iterdir()), *sorted(pins.links.iterdir()), *sorted(pins.netns.iterdir())]


def _repin_from(path: Path, pins: Pins, missing: list[str]) -> None:
    with suppress(KernelRefused):
        for map_id in _maps_of(path, pins):
            with Descriptor(syscalls.open_map_id(map_id)) as found:
                name = syscalls.map_info(found.fd).name.decode()
                if name in missing and not (pins.maps / name).exists():
                    syscalls.pin(found.fd, pins.maps / name)


def _maps_of(path: Path, pins: Pins) -> list[int]:
    with Descriptor(syscalls.open_pin(path)) as pinned:
        if path.parent == pins.programs:
            return syscalls.program_maps(pinned.fd)
        with Descriptor(syscalls.open_program_id(syscalls.link_info(pinned.fd).prog_id)) as program:
            return syscalls.program_maps(program.fd)
