"""`sidestep maps`: the pinned maps, how full they are, and their entries."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused, NotAttached, SidestepError
from bpf.layout import TABLES, Cookie, PodEntry
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import KINDS, Entry, Tables, entries
from cni.enrolment.entries import Identity
from installer.commands.maps.decode import Names, Plain, cookies, decoded, is_about_pods
from installer.commands.names import cookie_of

_FOR_PROGRAMS = ("steered",)  # each CPU has its own, for one packet


class UnknownMap(SidestepError):
    """The map does not exist, or the wanted entries cannot be listed. The message names the maps that can be."""


@dataclass
class Listing:
    """Entries of one map, decoded as they are read. `left_out` is known once all have been read."""

    name: str
    limit: int | None  # entries at most; None for all
    _found: Iterator[Entry]
    _names: Names
    left_out: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Plain]:
        for key, value in islice(self._found, self.limit):
            yield decoded(self.name, key, value, self._names)
        self.left_out = sum(1 for _ in self._found)


def maps_of(pins: Pins, pod: str = "") -> list[Plain]:
    """All pinned maps. With a pod: only maps with entries of pods, counting this pod's."""
    pins = pins.look_only()
    pins.require_attached()
    wanted = _cookies_of(pins, pod) if pod else None
    names = sorted(path.name for path in pins.maps.iterdir())
    return [_map_of(pins, name, wanted) for name in names if wanted is None or _is_kept_by_pod(name)]


def listing_of(pins: Pins, name: str, pod: str = "", limit: int | None = None) -> Listing:
    """The entries of one map; with a pod, only this pod's. Raises UnknownMap, NoSuchPod, NotAttached."""
    pins = pins.look_only()
    pins.require_attached()
    _require_listable(pins, name)
    if pod and not _is_kept_by_pod(name):
        raise UnknownMap(
            f"the map {name} has no entries of single pods; give --pod with one of {', '.join(sorted(_kept_by_pod()))}"
        )
    names = _names(pins)
    found = entries(pins, name)
    if pod:
        found = _about(found, _cookies_of(pins, pod))
    return Listing(name, limit, found, names)


def _map_of(pins: Pins, name: str, pod: set[int] | None) -> Plain:
    with Descriptor(syscalls.open_pin(pins.maps / name, syscalls.READ_ONLY)) as table:
        info, memory = syscalls.map_info(table.fd), kernel_says(table.fd).get("memlock", "")
    kind = KINDS.get(info.type, f"type {info.type}")
    return {
        "name": name,
        "kind": kind,
        "entries": _count(pins, name, pod),
        "limit": info.max_entries if kind != "ringbuf" and info.max_entries else None,  # a ring buffer's is in bytes
        "bytes": int(memory) if memory.isdecimal() else None,
        "key_bytes": info.key_size,
        "value_bytes": info.value_size,
    }


def _count(pins: Pins, name: str, pod: set[int] | None) -> int | None:
    """The number of entries. None if user space cannot read them, or if another version's have another layout."""
    if not _is_readable(name):
        return None
    try:
        found: Iterable[Entry] = entries(pins, name) if pod is None else _about(entries(pins, name), pod)
        return sum(1 for _ in found)
    except (NotAttached, KernelRefused):
        return None


def kernel_says(fd: int) -> dict[str, str]:
    """The lines of /proc/self/fdinfo for a BPF map or program. They have figures that the BPF system call lacks."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _about(found: Iterable[Entry], pods: set[int]) -> Iterator[Entry]:
    return ((key, value) for key, value in found if (cookies(key) | cookies(value)) & pods)


def _names(pins: Pins) -> dict[int, str]:
    """The names of this node's pods by cookie."""
    return {
        key.cookie: str(Identity.of(value))
        for key, value in entries(pins, "pods")
        if isinstance(key, Cookie) and isinstance(value, PodEntry)
    }


def _cookies_of(pins: Pins, pod: str) -> set[int]:
    with Tables(pins) as tables:
        return {cookie_of(tables, pod)}


def _kept_by_pod() -> Iterator[str]:
    return (name for name in TABLES if _is_kept_by_pod(name))


def _is_kept_by_pod(name: str) -> bool:
    return _is_readable(name) and is_about_pods(*TABLES[name])


def _is_readable(name: str) -> bool:
    return name in TABLES and name not in _FOR_PROGRAMS


def _require_listable(pins: Pins, name: str) -> None:
    listable = {path.name for path in pins.maps.iterdir() if _is_readable(path.name)}
    if name not in listable:
        there = "/" not in name and (pins.maps / name).exists()
        what = f"only the programs can read the map {name}" if there else f"there is no map {name}"
        raise UnknownMap(f"{what}; give one of {', '.join(sorted(listable))}")
