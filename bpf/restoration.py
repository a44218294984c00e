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
