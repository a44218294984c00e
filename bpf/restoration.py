"""Puts back what somebody has taken from our directory on the bpffs, without losing what the maps hold.

A map lives as long as a program or a descriptor refers to it, so a deleted pin is no lost map: it is found again
through the programs that use it, or through the agent's own descriptors.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.layout import STORAGES, TABLES
from bpf.pins import Descriptor, Pins


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
