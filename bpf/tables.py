"""Typed views of the pinned maps. One Tables object per process.

Safe to use from many threads: each call is one syscall.

A full map raises TableFull with its name and limit. Scans read keys in batches and skip entries that vanish meanwhile.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Generic, TypeVar

from bpf import syscalls
from bpf.errors import TableFull
from bpf.layout import (
    TABLES,
    Address,
    ConnectionKey,
    Cookie,
    Destination,
    InterfaceKey,
    ListenerKey,
    NetworkKey,
    Owner,
    Pod,
    PortKey,
    Quad,
    Route,
    Word,
)
from bpf.pins import Pins

Key = TypeVar("Key", bound=ctypes.Structure)
Value = TypeVar("Value", bound=ctypes.Structure)


class Table(Generic[Key, Value]):
    """One pinned map."""

    def __init__(self, pins: Pins, name: str) -> None:
        self.name = name
        self._fd = pins.open_map(name)
        self.key, self._value = TABLES[name]

    def close(self) -> None:
        """Close the descriptor; the pin stays."""
        os.close(self._fd)

    def get(self, key: Key) -> Value | None:
        """The entry of `key`, or None."""
        value = self._value()
        return value if syscalls.map_lookup(self._fd, key, value) else None  # type: ignore[return-value]

    def put(self, key: Key, value: Value) -> None:
        """Create or replace. Raises TableFull when there is no room."""
        number = syscalls.map_update(self._fd, key, value)
        if number in (errno.E2BIG, errno.ENOSPC):
            limit = syscalls.map_info(self._fd).max_entries
            raise TableFull(f"BPF map {self.name} is full at {limit} entries; fewer pods or rules on this node")
        if number:
            raise syscalls.refused("bpf_map_update_elem", self.name, number)

    def remove(self, key: Key) -> bool:
        """Delete; False when there was none."""
        return syscalls.map_delete(self._fd, key)

    def every_key(self) -> Iterator[Key]:
        """Every key, in no order; an entry added or removed meanwhile may or may not appear."""
        current: ctypes.Structure | None = None
        while True:
            following = self.key()
            if not syscalls.map_next_key(self._fd, current, following):
                return
            yield following  # type: ignore[misc]
            current = following

    def every(self) -> Iterator[tuple[Key, Value]]:
        """Every entry that still exists when it is read."""
        for key in self.every_key():
            value = self.get(key)
            if value is not None:
                yield key, value


class Tables:
    """All the maps user space touches."""

    def __init__(self, pins: Pins) -> None:
        self.pods: Table[Cookie, Pod] = Table(pins, "pods")
        self.addresses: Table[Address, Owner] = Table(pins, "addresses")
        self.port_rules: Table[PortKey, Word] = Table(pins, "port_rules")
        self.networks: Table[NetworkKey, Word] = Table(pins, "networks")
        self.routes: Table[NetworkKey, Route] = Table(pins, "routes")
        self.interfaces: Table[InterfaceKey, Word] = Table(pins, "interfaces")
        self.proxies: Table[Cookie, Quad] = Table(pins, "proxies")
        self.started: Table[Cookie, Word] = Table(pins, "started")
        self.listeners: Table[ListenerKey, Quad] = Table(pins, "listeners")
        self.handshakes: Table[ConnectionKey, Destination] = Table(pins, "handshakes")
        self.dials: Table[ConnectionKey, Word] = Table(pins, "dials")

    def close(self) -> None:
        """Close every descriptor."""
        for table in vars(self).values():
            table.close()

    def __enter__(self) -> "Tables":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
