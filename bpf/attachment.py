"""Attaches and detaches the programs, and puts missing pins back.

The first attach makes everything in a directory of its own and renames it when it is complete. So a crash leaves either
nothing or everything. If nothing has changed, the next attach does nothing. If the sources have changed, it replaces
the programs in place. If somebody has removed pins, they are put back and the maps keep their entries: a map lives as
long as a program or a descriptor refers to it, so it can be found through the programs that use it or through the
agent's descriptors.
"""

import ctypes
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from bpf import syscalls, takeover
from bpf.acceleration import attach_messages, detach_messages, repin_messages
from bpf.bpffs import require_bpffs, require_pins_on
from bpf.compiler import sources_digest
from bpf.errors import KernelRefused, NotAttached
from bpf.hooks import CGROUP_HOOKS, DECIDING, HOOKS, LOOKUP_HOOK, MESSAGE_HOOK
from bpf.kernel import from_here, on_node, require_capabilities
from bpf.layout import STORAGES, TABLES, BuildEntry, Word
from bpf.layouts import layouts
from bpf.loading import load_and_pin
from bpf.pins import OtherVersion, Pins
from bpf.places import further_places, link_directories, link_directories_of, pins_of_place
from bpf.steering import lead_to_lookup, leads_to_lookup, load_instance, opened
from bpf.syscalls import Descriptor

# maps that may be lost: accelerated connections go on by TCP
_FORGETTABLE = ("pairings",)
_LINKED = tuple(hook.name for hook in CGROUP_HOOKS)


class Outcome(StrEnum):
    """What attaching did: nothing, attach, swap programs in place, attach beside another layout, or at more places."""

    UNCHANGED = "unchanged"
    ATTACHED = "attached"
    SWAPPED = "swapped"
    BESIDE = "beside"
    EXTENDED = "extended"


def attach_programs(pins: Pins, cgroup: Path) -> Outcome:
    """Attach the programs of this source tree, doing as little as possible.

    If sources and cgroup are the same as last time and everything is still attached, nothing is loaded. Otherwise new
    programs replace the old ones on their links; maps and open connections stay. Raises CompileFailed, LibraryMissing,
    KernelRefused, NotAttached, UnknownExtra; OtherVersion if pinned maps have other shapes.

    If another layout is attached, this one is attached beside it and gets what can be copied about its pods. The caller
    takes over the rest, then calls retire_others().
    """
    require_bpffs(pins.bpffs)
    require_capabilities()
    with _exclusively(pins.bpffs), _of_this_version():
        _clear_leftovers(pins)
        if not pins.root.exists():
            others = takeover.attached_others(pins)
            _attach_fresh(pins, cgroup, others)
            _attach_messages(pins)
            return Outcome.BESIDE if others else Outcome.ATTACHED
        repin_maps(pins, {})
        repin_messages(pins)
        takeover.note_shapes(pins.root)
        if _recorded(pins)[:2] == (sources_digest(), str(cgroup)) and is_attached(pins):
            _attach_messages(pins)  # again: this is an attach's last step, and the last attach may have crashed before
            return Outcome.UNCHANGED
        _swap(pins, cgroup)
        _attach_messages(pins)
        return Outcome.SWAPPED


def attach_also(pins: Pins, cgroup: Path) -> bool:
    """Attach the pinned programs at one more cgroup. False if they are attached at it, or above it, already.

    Places below the new one go once it is there: it has their pods too. Raises KernelRefused, NotAttached.
    """
    with _exclusively(pins.bpffs):
        _clear_leftovers(pins)
        _drop_places(pins, lambda place: _is_made_anew(pins, place))
        first, *more = places_of(pins)
        if any(cgroup.is_relative_to(place) for place in (first, *more)):
            return False
        fresh = pins.top / f"new-{os.getpid()}"
        fresh.mkdir(mode=0o700)
        try:
            _link_cgroup(pins.programs, fresh, cgroup)
            if first.is_relative_to(cgroup):
                for hook in CGROUP_HOOKS:
                    (fresh / hook.name).rename(pins.links / hook.name)
                recorded = _recorded(pins)
                _record(pins.maps, cgroup, recorded.lacking, recorded.sources)
            else:
                pins.places.mkdir(mode=0o700, exist_ok=True)
                fresh.rename(pins_of_place(pins, cgroup))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _drop_places(pins, lambda place: place != cgroup and place.is_relative_to(cgroup))
        return True


def places_of(pins: Pins) -> list[Path]:
    """The cgroups that the programs should be attached at: the recorded one, then further ones that are there.

    Raises NotAttached if none is recorded.
    """
    first = _recorded(pins).cgroup
    if not first:
        raise NotAttached(f"{pins.maps / 'build'} is not there; run `sidestep attach` (or start the agent)")
    return [Path(first), *(place for place in further_places(pins) if place.is_dir())]


def attached_cgroups(pins: Pins, names: Collection[str] = _LINKED) -> frozenset[int]:
    """The ids of the cgroups that each of these programs is attached at, by default all, as the kernel says now.

    A cgroup's id is its directory's inode.
    """
    found = set()
    for directory in link_directories(pins):
        ids = {cgroup_of_link(directory / name) for name in names}
        found |= ids if len(ids) == 1 else set()
    return frozenset(found - {0})


def detached(pins: Pins, names: Collection[str] = DECIDING) -> frozenset[str]:
    """Those of these programs that are attached to no cgroup at all, as the kernel says now."""
    directories = link_directories(pins)
    return frozenset(name for name in names if not any(cgroup_of_link(each / name) for each in directories))


def cgroup_of_link(pinned: Path) -> int:
    """Id of the cgroup that a pinned link is attached to; 0 if there is no link or it is attached to nothing."""
    try:
        with Descriptor(syscalls.open_pin(pinned)) as link:
            return int(syscalls.link_info(link.fd).cgroup_id)
    except (KernelRefused, OSError):
        return 0


def retire_others(pins: Pins) -> None:
    """Take off the other layouts, whose running pods are all in this one. Open connections go on."""
    with _exclusively(pins.bpffs):
        for other in takeover.attached_others(pins):
            takeover.retire(pins, other)
        takeover.clear_retired(pins)


def detach_programs(pins: Pins) -> bool:
    """Remove all links, programs and maps of sidestep; False if there were none. Open connections go on.

    Raises KernelRefused if there is no bpffs.
    """
    require_pins_on(pins.bpffs)
    with _exclusively(pins.bpffs):
        if not pins.top.exists():
            return False
        _stop_deciding(pins)
        # links before maps: no program may run with a part of its maps
        for layout in layouts(pins):
            for directory in link_directories_of(layout):
                for path in directory.glob("*"):
                    _end(path)
            for directory in (layout / "netns", *link_directories_of(layout)):
                shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(pins.top)
        return True


def _stop_deciding(pins: Pins) -> None:
    """Stop capturing new connections, then wait until the proxies know the destinations of the captured ones."""
    every = layouts(pins)
    steering = [path for layout in every for path in (layout / "netns").glob("*")]
    links = [directory for layout in every for directory in link_directories_of(layout)]
    deciding = [path for directory in links for name in DECIDING if (path := directory / name).exists()]
    for path in (*deciding, *steering):
        _end(path)
    if steering:
        time.sleep(takeover.ON_THE_WAY)


def _end(pinned: Path) -> None:
    """Remove the pin of a link and detach it. Without its pin alone, it would live on in the agent, which has it open.

    The pin goes first: no crash may leave the pin of a link that is detached.
    """
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(pinned)) as link:
        pinned.unlink()
        syscalls.detach_link(link.fd, pinned)
    pinned.unlink(missing_ok=True)


def is_attached(pins: Pins) -> bool:
    """Whether all maps and programs are pinned and all cgroup links are attached to the cgroups that they are for.

    The pin of a link is not enough: if the cgroup is removed, the link stays but is attached to nothing. A further
    cgroup that has gone lacks nothing.
    """
    if not pins.root.exists():
        return False
    cgroup = Path(_recorded(pins).cgroup)
    return (
        all((pins.maps / name).exists() for name in (*TABLES, *STORAGES))
        and all((pins.programs / hook.name).exists() for hook in HOOKS)
        and all(_is_linked(pins.links / hook.name, cgroup) for hook in CGROUP_HOOKS)
        and _are_further_linked(pins, _LINKED)
        and leads_to_lookup(pins)
    )


def is_deciding(pins: Pins) -> bool:
    """Whether the deciding programs are attached, so that no connection passes uncaptured.

    It takes a tenth of is_attached()'s time. While a repair is under way and the cgroup is not recorded, links at any
    one cgroup count as attached.
    """
    recorded = _recorded(pins).cgroup
    try:
        wanted = Path(recorded).stat().st_ino if recorded else 0
    except OSError:  # the cgroup has gone
        return False
    found = {cgroup_of_link(pins.links / name) for name in DECIDING}
    return 0 not in found and found <= {wanted or max(found)} and _are_further_linked(pins, DECIDING)


def _are_further_linked(pins: Pins, names: Collection[str]) -> bool:
    """Whether these links are attached at every further cgroup that is there."""
    return all(
        _is_linked(directory / name, place)
        for place, directory in further_places(pins).items()
        if place.is_dir()
        for name in names
    )


def repin_maps(pins: Pins, held: Mapping[str, int]) -> list[str]:
    """Pin every map whose pin is missing, if the map can still be found; returns the names of the maps pinned.

    `held` are open descriptors of maps by name. Maps are found through them and through pinned programs and links.
    """
    pins.make_directories()
    missing = [name for name in (*TABLES, *STORAGES) if not (pins.maps / name).exists()]
    for name in missing:
        if name in held:
            syscalls.pin(held[name], pins.maps / name)
    for path in _objects(pins) if missing else ():
        _repin_from(path, pins, missing)
    return [name for name in missing if (pins.maps / name).exists()]


def unpin_others(pins: Pins, held: Mapping[str, int]) -> list[str]:
    """Remove the pins of maps that are not the maps in `held`; returns their names.

    If somebody detaches and attaches while an agent runs, the agent writes to maps that no program reads. So this
    removes the pins of the maps that are not the agent's, and the pin of `build`. Without `build`, the next
    attach_programs() makes new programs, for the maps that are pinned by then. `held` are the agent's descriptors by
    name.
    """
    others = [name for name, fd in held.items() if _pinned_id(pins.maps / name) not in (None, syscalls.map_info(fd).id)]
    for name in [*others, *(["build"] if others else [])]:
        (pins.maps / name).unlink(missing_ok=True)
    return others


def is_pinned(pins: Pins, name: str, held: int) -> bool:
    """Whether the map pinned as `name` is the map of the descriptor `held`."""
    return _pinned_id(pins.maps / name) == int(syscalls.map_info(held).id)


@contextmanager
def _of_this_version() -> Iterator[None]:
    """Turn OtherVersion's advice into `sidestep detach`.

    Only `attach` may advise this. Read-only commands must not, because it ends the capture of every pod.
    """
    try:
        yield
    except OtherVersion as error:
        found = str(error).partition("; ")[0]
        raise OtherVersion(
            f"{found}; run `sidestep detach` and start again; between the two, no pod of the node is captured"
        ) from error


@contextmanager
def _exclusively(bpffs: Path) -> Iterator[None]:
    """Let only one attach or detach run on this bpffs at a time. If the process dies, the kernel releases the lock."""
    with Descriptor(os.open(bpffs, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        fcntl.flock(directory.fd, fcntl.LOCK_EX)
        yield


def _attach_messages(pins: Pins) -> None:
    """Attach acceleration's program if the kernel has taken it. Without it, capture works and the level is off."""
    if (pins.programs / MESSAGE_HOOK.name).exists():
        attach_messages(pins)
    else:
        detach_messages(pins)


def _clear_leftovers(pins: Pins) -> None:
    for leftover in pins.top.glob("new-*") if pins.top.exists() else ():
        shutil.rmtree(leftover)


def _attach_fresh(pins: Pins, cgroup: Path, others: list[Path]) -> None:
    pins.top.mkdir(mode=0o700, exist_ok=True)
    fresh = pins.top / f"new-{os.getpid()}"
    for name in ("maps", "programs", "links", "netns"):
        (fresh / name).mkdir(parents=True, mode=0o700)
    try:
        for other in others:
            takeover.share_maps(fresh, other)
        lacking = load_and_pin(fresh / "maps", fresh / "programs")
        _lead_to_lookup(fresh / "maps", fresh / "programs")
        for other in others:
            takeover.copy_maps(fresh, other)
        takeover.note_shapes(fresh)
        _link_cgroup(fresh / "programs", fresh / "links", cgroup)
        _record(fresh / "maps", cgroup, lacking)
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
        lacking = load_and_pin(pins.maps, fresh)
        for hook in CGROUP_HOOKS:
            _relink(fresh / hook.name, pins.links / hook.name, hook.attach_type, cgroup)
        _drop_places(pins, lambda place: place.is_relative_to(cgroup) or cgroup.is_relative_to(place))
        for place, directory in further_places(pins).items():
            for hook in CGROUP_HOOKS:
                _relink(fresh / hook.name, directory / hook.name, hook.attach_type, place)
        _lead_to_lookup(pins.maps, fresh)
        _swap_instances(pins)
        for program in {path.name for path in pins.programs.iterdir()} - {path.name for path in fresh.iterdir()}:
            (pins.programs / program).unlink()
        for path in list(fresh.iterdir()):
            path.rename(pins.programs / path.name)
        for directory in link_directories(pins):
            for stale in {p.name for p in directory.iterdir()} - {h.name for h in CGROUP_HOOKS}:
                (directory / stale).unlink()
        _record(pins.maps, cgroup, lacking)
    finally:
        shutil.rmtree(fresh)


def _drop_places(pins: Pins, is_needless: Callable[[Path], bool]) -> None:
    """Detach from the further cgroups that need it no more, and forget those that have gone."""
    for place, directory in further_places(pins).items():
        if is_needless(place) or not place.is_dir():
            for path in directory.iterdir():
                _end(path)
            directory.rmdir()


def _is_made_anew(pins: Pins, place: Path) -> bool:
    """Whether a further cgroup was removed and made again, as that of a service that restarts: no link is at it."""
    with suppress(FileNotFoundError):
        directory, inode = pins_of_place(pins, place), place.stat().st_ino
        return all(cgroup_of_link(directory / hook.name) != inode for hook in CGROUP_HOOKS)
    return True


def _lead_to_lookup(maps: Path, programs: Path) -> None:
    with (
        Descriptor(syscalls.open_pin(maps / "inbound")) as inbound,
        Descriptor(syscalls.open_pin(programs / LOOKUP_HOOK.name)) as program,
    ):
        lead_to_lookup(inbound.fd, program.fd)


def _swap_instances(pins: Pins) -> None:
    with opened(pins) as maps:
        for path in pins.netns.iterdir():
            with (
                Descriptor(load_instance(maps, int(path.name))) as instance,
                Descriptor(syscalls.open_pin(path)) as link,
                suppress(KernelRefused),
            ):
                # refused only if the namespace is gone; then the link is dead anyway
                syscalls.update_link(link.fd, instance.fd, path)


def _make_way(pins: Pins) -> None:
    """Raise OtherVersion if a pinned map has another shape than the new programs need.

    Forgettable maps of another shape lose their pin instead. The compiler makes missing maps.
    """
    for name in TABLES:
        if (pins.maps / name).exists():
            os.close(pins.open_map(name))
    for name, size in STORAGES.items():
        if (pins.maps / name).exists() and not pins.has_values(name, size):
            if name not in _FORGETTABLE:
                raise OtherVersion(f"{pins.maps / name} was made by another version of sidestep")
            (pins.maps / name).unlink()


def _relink(program: Path, pinned: Path, attach_type: int, cgroup: Path) -> None:
    """Put the new program on the pinned link, or make a new link if the pinned one is not at this cgroup.

    A new link is made before the old one goes. So for a moment both programs run, which connect.c allows for
    (is_rewritten()), but there is never none.
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
    """Whether the pinned link is attached to the cgroup at this path. A cgroup's id is its directory's inode."""
    try:
        return cgroup_of_link(pinned) == cgroup.stat().st_ino
    except OSError:
        return False


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


class _Build(NamedTuple):
    """What the map `build` says of the attached programs: of their sources, where they are, and extras they lack."""

    sources: bytes
    cgroup: str
    lacking: list[str]


def _record(maps: Path, cgroup: Path, lacking: Collection[str], sources: bytes | None = None) -> None:
    digest = (ctypes.c_uint8 * 32)(*(sources or sources_digest()))
    build = BuildEntry(digest, str(on_node(cgroup)).encode(), ",".join(lacking).encode())
    with Descriptor(syscalls.open_pin(maps / "build")) as table:
        if number := syscalls.map_update(table.fd, Word(0), build):
            raise syscalls.refused("bpf_map_update_elem", "build", number)


def _recorded(pins: Pins) -> _Build:
    build = BuildEntry()
    if not (pins.maps / "build").exists():
        return _Build(b"", "", [])
    with Descriptor(pins.open_map("build")) as table:
        syscalls.map_lookup(table.fd, Word(0), build)
    cgroup = str(from_here(Path(build.cgroup.decode()))) if build.cgroup else ""
    return _Build(bytes(build.sources), cgroup, build.extras_lacking)


def _pinned_id(path: Path) -> int | None:
    try:
        with Descriptor(syscalls.open_pin(path)) as pinned:
            return int(syscalls.map_info(pinned.fd).id)
    except KernelRefused:
        return None


def _objects(pins: Pins) -> list[Path]:
    """All pins that lead to a program: pins of programs and of links."""
    directories = (pins.programs, *link_directories(pins), pins.netns)
    return [path for directory in directories for path in sorted(directory.iterdir())]


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
