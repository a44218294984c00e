"""Typed views of the pinned maps. One Tables object per process.

Safe to use from many threads: each call is one syscall.

A full map raises TableFull with its name and limit. Scans read keys in batches and skip entries that vanish meanwhile.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from bpf import syscalls
from bpf.errors import TableFull
from bpf.kernel import possible_cpus
from bpf.layout import (
    TABLES,
    TOTALS,
    Address,
    Connection,
    ConnectionKey,
    Cookie,
    DestinationEntry,
    EndKey,
    InterfaceKey,
    ListenerKey,
    MeetingEntry,
    NetworkKey,
    NodeEntry,
    OwnerEntry,
    PodEntry,
    PortKey,
    Quad,
    RouteEntry,
    TallyEntry,
    TrafficEntry,
    Word,
)
from bpf.pins import Pins

Key = TypeVar("Key", bound=ctypes.Structure)
Value = TypeVar("Value", bound=ctypes.Structure)


class Table(Generic[Key, Value]):
    """One pinned map."""

    def __init__(self, pins: Pins, name: str) -> None:
        self.name = name
        self.descriptor = pins.open_map(name)
        self.key, self._value = TABLES[name]

    def get(self, key: Key) -> Value | None:
        """The entry of `key`, or None."""
        value = self._value()
        return value if syscalls.map_lookup(self.descriptor, key, value) else None  # type: ignore[return-value]

    def put(self, key: Key, value: Value) -> None:
        """Create or replace. Raises TableFull when there is no room."""
        self._require(syscalls.map_update(self.descriptor, key, value))

    def insert(self, key: Key, value: Value) -> bool:
        """Create; False when there is one already. Raises TableFull when there is no room."""
        number = syscalls.map_insert(self.descriptor, key, value)
        if number == errno.EEXIST:
            return False
        self._require(number)
        return True

    def _require(self, number: int) -> None:
        if number in (errno.E2BIG, errno.ENOSPC):
            limit = syscalls.map_info(self.descriptor).max_entries
            raise TableFull(f"BPF map {self.name} is full at {limit} entries; fewer pods or rules on this node")
        if number:
            raise syscalls.refused("bpf_map_update_elem", self.name, number)

    def remove(self, key: Key) -> bool:
        """Delete; False when there was none."""
        return syscalls.map_delete(self.descriptor, key)

    @property
    def limit(self) -> int:
        """How many entries it can have."""
        return int(syscalls.map_info(self.descriptor).max_entries)

    def count(self) -> int:
        """How many entries it has: a walk over all keys."""
        return sum(1 for _ in self.every_key())

    def every_key(self) -> Iterator[Key]:
        """Every key, in no order; an entry added or removed meanwhile may or may not appear."""
        current: ctypes.Structure | None = None
        while True:
            following = self.key()
            if not syscalls.map_next_key(self.descriptor, current, following):
                return
            yield following  # type: ignore[misc]
            current = following

    def every(self) -> Iterator[tuple[Key, Value]]:
        """Every entry that still exists when it is read."""
        for key in self.every_key():
            value = self.get(key)
            if value is not None:
                yield key, value


class Sums(Table[Cookie, Value]):
    """A table whose entries are 64-bit counters that each CPU has of its own: read in sum, made with zeroes."""

    def __init__(self, pins: Pins, name: str) -> None:
        super().__init__(pins, name)
        self._counters = ctypes.sizeof(self._value) // 8
        self._row = (ctypes.c_uint64 * self._counters) * possible_cpus()

    def get(self, key: Cookie) -> Value | None:
        """The sums of `key`, or None."""
        row = self._row()
        if not syscalls.map_lookup(self.descriptor, key, row):
            return None
        sums = (ctypes.c_uint64 * self._counters)(*map(sum, zip(*row, strict=True)))
        return self._value.from_buffer_copy(sums)  # type: ignore[return-value]

    def begin(self, key: Cookie) -> bool:
        """Make an entry of zeroes; False when there is one, which stays. Raises TableFull when there is no room."""
        number = syscalls.map_insert(self.descriptor, key, self._row())
        if number == errno.EEXIST:
            return False
        self._require(number)
        return True


class Totals:
    """The per-CPU counters of what became of connections."""

    def __init__(self, pins: Pins) -> None:
        self.descriptor = pins.open_map("totals")
        self._row = ctypes.c_uint64 * possible_cpus()

    def read(self) -> dict[tuple[str, str], int]:
        """Direction and verdict → how many, since the map was made."""
        found = {}
        for index, name in enumerate(TOTALS):
            row = self._row()
            syscalls.map_lookup(self.descriptor, Word(index), row)
            found[name] = sum(row)
        return found


class Tables:
    """All the maps user space touches."""

    def __init__(self, pins: Pins) -> None:
        self.pods: Table[Cookie, PodEntry] = Table(pins, "pods")
        self.addresses: Table[Address, OwnerEntry] = Table(pins, "addresses")
        self.port_rules: Table[PortKey, Word] = Table(pins, "port_rules")
        self.networks: Table[NetworkKey, Word] = Table(pins, "networks")
        self.routes: Table[NetworkKey, RouteEntry] = Table(pins, "routes")
        self.interfaces: Table[InterfaceKey, Word] = Table(pins, "interfaces")
        self.proxies: Table[Cookie, Quad] = Table(pins, "proxies")
        self.started: Table[Cookie, Word] = Table(pins, "started")
        self.listeners: Table[ListenerKey, Quad] = Table(pins, "listeners")
        self.handshakes: Table[ConnectionKey, DestinationEntry] = Table(pins, "handshakes")
        self.dials: Table[ConnectionKey, Word] = Table(pins, "dials")
        self.accelerated: Table[EndKey, Quad] = Table(pins, "accelerated")
        self.meetings: Table[Connection, MeetingEntry] = Table(pins, "meetings")
        self.traffic: Sums[TrafficEntry] = Sums(pins, "traffic")
        self.tallies: Sums[TallyEntry] = Sums(pins, "tallies")
        self._node: Table[Word, NodeEntry] = Table(pins, "node")
        self._totals = Totals(pins)

    @property
    def counters(self) -> "tuple[Sums[Any], ...]":
        """What is counted for each pod."""
        return self.traffic, self.tallies

    def named(self) -> dict[str, Table[Any, Any]]:
        """All tables with entries, by name."""
        return {name: table for name, table in vars(self).items() if isinstance(table, Table) and name[0] != "_"}

    def node_settings(self) -> NodeEntry:
        """The node's settings as the programs see them."""
        return self._node.get(Word(0)) or NodeEntry()

    def set_node(self, settings: NodeEntry) -> None:
        """Make the programs follow other settings, at once."""
        self._node.put(Word(0), settings)

    def connection_totals(self) -> dict[tuple[str, str], int]:
        """How many connections of enrolled pods became what: by direction and verdict, since the map was made."""
        return self._totals.read()

    def descriptors(self) -> dict[str, int]:
        """The open descriptor of each map by name: with them a map outlives its pin."""
        own = {"totals": self._totals.descriptor, "node": self._node.descriptor}
        return {name: table.descriptor for name, table in self.named().items()} | own

    def close(self) -> None:
        """Close every descriptor."""
        for descriptor in self.descriptors().values():
            os.close(descriptor)

    def __enter__(self) -> "Tables":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
