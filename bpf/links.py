"""Attaching: what is pinned where, and how a start finds out that nothing, or only the programs, has to change.

    <bpffs>/sidestep/v1/maps/<name>       the tables of maps.h
                       /programs/<name>   the loaded programs, of which sk_lookup is linked per pod
                       /links/<name>      the global cgroup links
                       /netns/<cookie>    one sk_lookup link per enrolled pod

v1 is the layout: it changes when an old pinned map can't serve new programs. Everything is made in a directory of its
own and renamed when complete, so a crash leaves either nothing or all of it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bpf import syscalls
from bpf.compiler import CGROUP_HOOKS, HOOKS, NETNS_HOOK, compile_and_pin, sources_digest
from bpf.errors import KernelRefused, NotAttached
from bpf.kernel import require_bpffs
from bpf.layout import TABLES, Build, Word

LAYOUT = "v1"


class Outcome(StrEnum):
    """What an attach had to do."""

    UNCHANGED = "unchanged"
    ATTACHED = "attached"
    SWAPPED = "swapped"


class Descriptor:
    """An owned file descriptor: `with Descriptor(fd) as d: … d.fd …`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it; once."""
        os.close(self.fd)

    def __enter__(self) -> "Descriptor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Pins:
    """The directories of one installation below a bpffs mount."""

    bpffs: Path

    @property
    def top(self) -> Path:
        """All layouts."""
        return self.bpffs / "sidestep"

    @property
    def root(self) -> Path:
        """The current layout."""
        return self.top / LAYOUT

    @property
    def maps(self) -> Path:
        """Pinned tables."""
        return self.root / "maps"

    @property
    def programs(self) -> Path:
        """Pinned programs."""
        return self.root / "programs"

    @property
    def links(self) -> Path:
        """Pinned cgroup links."""
        return self.root / "links"

    @property
    def netns(self) -> Path:
        """Pinned per-pod links."""
        return self.root / "netns"

    def open_map(self, name: str) -> int:
        """A descriptor of a table, its shape checked against layout.py. Raises NotAttached."""
        try:
            fd = syscalls.open_pin(self.maps / name)
        except KernelRefused as missing:
            raise NotAttached(
                f"{self.maps / name} is not there; run `sidestep attach` (or start the agent)"
            ) from missing
        key, value = TABLES[name]
        info = syscalls.map_info(fd)
        wanted = (syscalls.ctypes.sizeof(key), syscalls.ctypes.sizeof(value))
        if (info.key_size, info.value_size) != wanted:
            os.close(fd)
            raise NotAttached(
                f"{self.maps / name} has key and value of {(info.key_size, info.value_size)} bytes, this version "
                f"writes {wanted}; run `sidestep detach` and start again"
            )
        return fd


def attach(pins: Pins, cgroup: Path) -> Outcome:
    """Make the programs of this source tree the attached ones, doing as little as possible.

    Same sources and cgroup as last time: nothing is compiled or attached. Other sources: the new programs replace the
    old on their existing links, maps and live connections stay. Raises CompileFailed, KernelRefused, NotAttached.
    """
    require_bpffs(pins.bpffs)
    with _exclusively(pins.bpffs):
        _clear_leftovers(pins)
        if not pins.root.exists():
            _attach_fresh(pins, cgroup)
            return Outcome.ATTACHED
        if _recorded(pins) == (sources_digest(), str(cgroup)) and _all_pinned(pins):
            return Outcome.UNCHANGED
        _swap(pins, cgroup)
        return Outcome.SWAPPED


def detach(pins: Pins) -> bool:
    """Remove every link, program and map of ours; False when there was nothing. Live connections go on."""
    require_bpffs(pins.bpffs)
    with _exclusively(pins.bpffs):
        if not pins.top.exists():
            return False
        # links first: a capture that stops must stop as a whole before its tables go
        for directory in (pins.netns, pins.links):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(pins.top)
        return True


def link_pod(pins: Pins, cookie: int, netns_fd: int) -> bool:
    """Attach inbound steering to a pod's namespace and pin the link by cookie; False when it is there already."""
    path = pins.netns / str(cookie)
    if path.exists():
        return False
    with Descriptor(syscalls.open_pin(pins.programs / NETNS_HOOK.name)) as program:
        made = syscalls.create_link(program.fd, netns_fd, NETNS_HOOK.attach_type, f"netns {cookie}")
        with Descriptor(made) as link:
            syscalls.pin(link.fd, path)
    return True


def unlink_pod(pins: Pins, cookie: int) -> bool:
    """Detach inbound steering from a pod's namespace; False when there was no link."""
    try:
        (pins.netns / str(cookie)).unlink()
    except FileNotFoundError:
        return False
    return True


def linked_pods(pins: Pins) -> Iterator[tuple[int, bool]]:
    """Every pinned pod link as (cookie, alive); a link whose namespace is gone is not alive."""
    for path in sorted(pins.netns.iterdir()):
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path)) as link:
            yield int(path.name), syscalls.link_info(link.fd).target != 0


def pod_link_alive(pins: Pins, cookie: int) -> bool:
    """Whether the pod's namespace still exists and is steered."""
    try:
        with Descriptor(syscalls.open_pin(pins.netns / str(cookie))) as link:
            return syscalls.link_info(link.fd).target != 0
    except KernelRefused:
        return False


@contextmanager
def _exclusively(bpffs: Path) -> Iterator[None]:
    """One attach or detach at a time on this bpffs; the lock goes with the process."""
    with Descriptor(os.open(bpffs, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        fcntl.flock(directory.fd, fcntl.LOCK_EX)
        yield


def _clear_leftovers(pins: Pins) -> None:
    for leftover in pins.top.glob("new-*") if pins.top.exists() else ():
        shutil.rmtree(leftover)


def _attach_fresh(pins: Pins, cgroup: Path) -> None:
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
        raise


def _swap(pins: Pins, cgroup: Path) -> None:
    for name in TABLES:  # a table of another shape must not meet the new programs
        os.close(pins.open_map(name))
    fresh = pins.top / f"new-{os.getpid()}"
    fresh.mkdir(mode=0o700)
    try:
        compile_and_pin(pins.maps, fresh)
        moved = _recorded(pins)[1] != str(cgroup)
        for hook in CGROUP_HOOKS:
            _relink(fresh / hook.name, pins.links / hook.name, hook.attach_type, cgroup, moved)
        with Descriptor(syscalls.open_pin(fresh / NETNS_HOOK.name)) as steering:
            for path in pins.netns.iterdir():
                with Descriptor(syscalls.open_pin(path)) as link, suppress(KernelRefused):
                    # refused only for a namespace that is gone, whose link is dead anyway
                    syscalls.update_link(link.fd, steering.fd, path)
        for hook in HOOKS:
            (fresh / hook.name).rename(pins.programs / hook.name)
        for stale in {p.name for p in pins.links.iterdir()} - {h.name for h in CGROUP_HOOKS}:
            (pins.links / stale).unlink()
        _record(pins.maps, cgroup)
    finally:
        shutil.rmtree(fresh)


def _relink(program: Path, pinned: Path, attach_type: int, cgroup: Path, moved: bool) -> None:
    """Point an existing link at the new program, or make one where there is none or the cgroup has changed."""
    with Descriptor(syscalls.open_pin(program)) as new:
        if pinned.exists() and not moved:
            with Descriptor(syscalls.open_pin(pinned)) as link:
                syscalls.update_link(link.fd, new.fd, pinned)
            return
        made = _create_cgroup_link(new.fd, cgroup, attach_type)
        with Descriptor(made) as link:
            replacement = program.with_name(f"{program.name}-link")
            syscalls.pin(link.fd, replacement)
            replacement.rename(pinned)


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
    build = Build((syscalls.ctypes.c_uint8 * 32)(*sources_digest()), str(cgroup).encode())
    with Descriptor(syscalls.open_pin(maps / "build")) as table:
        if number := syscalls.map_update(table.fd, Word(0), build):
            raise syscalls.refused("bpf_map_update_elem", "build", number)


def _recorded(pins: Pins) -> tuple[bytes, str]:
    build = Build()
    with closing(Descriptor(pins.open_map("build"))) as table:
        syscalls.map_lookup(table.fd, Word(0), build)
    return bytes(build.sources), build.cgroup.decode()


def _all_pinned(pins: Pins) -> bool:
    return all((pins.links / hook.name).exists() for hook in CGROUP_HOOKS) and all(
        (pins.programs / hook.name).exists() for hook in HOOKS
    )
