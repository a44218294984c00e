"""Typed views of the pinned maps. A process needs one Tables object.

Many threads may use it: get, put, insert, begin and remove are one system call each.

If a map is full, writing raises TableFull with the map's name and limit. Scans read in batches and skip entries that
are removed meanwhile. Any call may raise KernelRefused.
"""

import ctypes
import errno
import os
from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeVar

from bpf import syscalls
from bpf.errors import KernelRefused, TableFull
from bpf.kernel import possible_cpus
from bpf.layout import (
    LIFETIMES,
    PASSAGES,
    TABLES,
    TOTALS,
    ZTUNNELS,
    AddressKey,
    Connection,
    ConnectionKey,
    Cookie,
    CoverageEntry,
    DestinationEntry,
    EndKey,
    FindingEntry,
    FindingKey,
    FlowEntry,
    FlowKey,
    FlowSumsEntry,
    InterfaceKey,
    KubeletEntry,
    ListenerKey,
    MeetingEntry,
    NetworkKey,
    NodeEntry,
    OwnAddressEntry,
    PodEntry,
    PortKey,
    Quad,
    QuestionKey,
    RouteEntry,
    ShadowCountsEntry,
    ShadowEntry,
    ShadowKey,
    ShadowSumsEntry,
    SteeredEntry,
    SteeringEntry,
    TallyEntry,
    TrafficEntry,
    UncapturedEntry,
    UncapturedKey,
    Word,
    ZtunnelsEntry,
)
from bpf.pins import Pins

Key = TypeVar("Key", bound=ctypes.Structure)
Value = TypeVar("Value", bound=ctypes.Structure)
Entry = tuple[ctypes.Structure, ctypes.Structure]

# enum bpf_map_type (uapi/linux/bpf.h): the types that our maps have
KINDS = {
    1: "hash",
    2: "array",
    3: "prog",
    5: "percpu_hash",
    6: "percpu_array",
    9: "lru_hash",
    11: "lpm_trie",
    18: "sockhash",
    24: "sk_storage",
    27: "ringbuf",
}
_EACH_CPU = ("percpu_hash", "percpu_array")
_ROOM = 256  # entries read at once
# the kernel cannot read this kind of map in batches: 524 is its ENOTSUPP; older kernels give the other two
_NO_BATCHES = (524, errno.EOPNOTSUPP, errno.EINVAL)


class Table(Generic[Key, Value]):
    """One pinned map. In a per-CPU map, a value that is read is the sum over all CPUs.

    Raises NotAttached, OtherVersion or KernelRefused if the map cannot be opened.
    """

    def __init__(self, pins: Pins, name: str) -> None:
        self.name = name
        self.descriptor = pins.open_map(name)
        self.key, self._value = TABLES[name]
        info = syscalls.map_info(self.descriptor)
        self.limit = int(info.max_entries)  # the most entries that the map can have
        self._cpus = possible_cpus() if KINDS.get(info.type) in _EACH_CPU else 0
        size = ctypes.sizeof(self._value)
        # each CPU's own value is padded to eight bytes
        self._entry_bytes = -(-size // 8) * 8 * self._cpus if self._cpus else size
        self._blank = ctypes.c_char * self._entry_bytes

    def get(self, key: Key) -> Value | None:
        """The value of `key`, or None if there is no entry."""
        raw = self._blank()
        return self._told(raw) if syscalls.map_lookup(self.descriptor, key, raw) else None

    def put(self, key: Key, value: Value) -> None:
        """Create or replace an entry. Raises TableFull."""
        self._write(key, value, syscalls.BPF_ANY)

    def insert(self, key: Key, value: Value) -> bool:
        """Create an entry; False, and no change, if there is one already. Raises TableFull."""
        return self._write(key, value, syscalls.BPF_NOEXIST)

    def begin(self, key: Key) -> bool:
        """Create an entry of zeroes; False, and no change, if there is one already. Raises TableFull."""
        return self._write(key, self._blank(), syscalls.BPF_NOEXIST)

    def remove(self, key: Key) -> bool:
        """Delete an entry; False if there was none."""
        return syscalls.map_delete(self.descriptor, key)

    def count(self) -> int:
        """The number of entries."""
        return sum(number for number, _, _ in self._pieces())

    def every_key(self) -> Iterator[Key]:
        """Every key, in no particular order. A key that is added or removed meanwhile may or may not appear."""
        size = ctypes.sizeof(self.key)
        for number, keys, _ in self._pieces():
            for at in range(number):
                yield self.key.from_buffer_copy(keys, at * size)  # type: ignore[misc]

    def every(self) -> Iterator[tuple[Key, Value]]:
        """Every entry, one by one, with no more than one batch in memory. Otherwise as every_key()."""
        size, value_size = ctypes.sizeof(self.key), self._entry_bytes
        for number, keys, values in self._pieces():
            for at in range(number):
                key = self.key.from_buffer_copy(keys, at * size)
                yield key, self._told(values[at * value_size : (at + 1) * value_size])  # type: ignore[misc]

    def _write(self, key: Key, value: syscalls.Buffer, flags: int) -> bool:
        number = syscalls.map_update(self.descriptor, key, value, flags)
        if number in (errno.E2BIG, errno.ENOSPC):
            raise TableFull(
                f"BPF map {self.name} is full at {self.limit} entries; run fewer pods or use fewer rules on this node"
            )
        if number and number != errno.EEXIST:
            raise syscalls.refused("bpf_map_update_elem", self.name, number)
        return not number

    def _told(self, raw: "bytes | ctypes.Array[ctypes.c_char]") -> Value:
        if self._cpus:
            counters = ctypes.c_uint64 * (ctypes.sizeof(self._value) // 8)
            raw = bytes(counters(*map(sum, zip(*(counters * self._cpus).from_buffer_copy(raw), strict=True))))
        return self._value.from_buffer_copy(raw)  # type: ignore[return-value]

    def _pieces(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Batches of entries: their number, their keys and their values."""
        batches = syscalls.Batches(self.descriptor, ctypes.sizeof(self.key), self._entry_bytes, _ROOM)
        try:
            while not batches.is_over:
                yield batches.read(), batches.keys.raw, batches.values.raw
        except KernelRefused as error:
            if error.errno not in _NO_BATCHES:
                raise
            yield from self._steps()

    def _steps(self) -> Iterator[tuple[int, bytes, bytes]]:
        """The same as _pieces(), one entry at a time.

        If a key is removed meanwhile, the kernel starts again at the first key. So the number of steps is limited to
        the number of entries that the map can have.
        """
        current, raw = None, self._blank()
        for _ in range(self.limit):
            following = self.key()
            if not syscalls.map_next_key(self.descriptor, current, following):
                return
            if syscalls.map_lookup(self.descriptor, following, raw):
                yield 1, bytes(following), raw.raw
            current = following


def entries(pins: Pins, name: str) -> Iterator[Entry]:
    """Every entry of one map, which stays open while the iterator is in use. Raises NotAttached, KernelRefused."""
    table: Table[Any, Any] = Table(pins, name)
    with syscalls.Descriptor(table.descriptor):
        yield from table.every()


class Tables:
    """The maps that user space reads or writes, except build, tracing and lost.

    Raises NotAttached, OtherVersion or KernelRefused if one of them cannot be opened.
    """

    def __init__(self, pins: Pins) -> None:
        self.pods: Table[Cookie, PodEntry] = Table(pins, "pods")
        self.addresses: Table[AddressKey, OwnAddressEntry] = Table(pins, "addresses")
        self.port_rules: Table[PortKey, Word] = Table(pins, "port_rules")
        self.networks: Table[NetworkKey, Word] = Table(pins, "networks")
        self.routes: Table[NetworkKey, RouteEntry] = Table(pins, "routes")
        self.interfaces: Table[InterfaceKey, Word] = Table(pins, "interfaces")
        self.proxies: Table[Cookie, Quad] = Table(pins, "proxies")
        self._ztunnels: Table[Word, ZtunnelsEntry] = Table(pins, "ztunnels")
        self._kubelet: Table[Word, KubeletEntry] = Table(pins, "kubelet")
        self.started: Table[Cookie, Word] = Table(pins, "started")
        self.listeners: Table[ListenerKey, Quad] = Table(pins, "listeners")
        self.handshakes: Table[ConnectionKey, DestinationEntry] = Table(pins, "handshakes")
        self.dials: Table[ConnectionKey, Word] = Table(pins, "dials")
        self.accelerated: Table[EndKey, Quad] = Table(pins, "accelerated")
        self.arrivals: Table[ConnectionKey, Quad] = Table(pins, "arrivals")
        self.meetings: Table[Connection, MeetingEntry] = Table(pins, "meetings")
        self.traffic: Table[Cookie, TrafficEntry] = Table(pins, "traffic")
        self.tallies: Table[Cookie, TallyEntry] = Table(pins, "tallies")
        self._node: Table[Word, NodeEntry] = Table(pins, "node")
        self._totals: Table[Word, Quad] = Table(pins, "totals")
        # held because no program refers to steering, and because the kernel empties inbound when nobody has it open
        self._steering: Table[Word, SteeringEntry] = Table(pins, "steering")
        self._steered: Table[Word, SteeredEntry] = Table(pins, "steered")
        self._inbound: Table[Word, Word] = Table(pins, "inbound")
        self.lost_handovers: Table[Cookie, Quad] = Table(pins, "lost_handovers")
        self.uncaptured: Table[UncapturedKey, UncapturedEntry] = Table(pins, "uncaptured")
        self.coverage: Table[Cookie, CoverageEntry] = Table(pins, "coverage")
        self.forgotten: Table[Cookie, Quad] = Table(pins, "forgotten")
        self._questions: Table[QuestionKey, Word] = Table(pins, "questions")
        self._passages: Table[Word, Quad] = Table(pins, "passages")
        self.flows: Table[FlowKey, FlowEntry] = Table(pins, "flows")
        self.flow_sums: Table[Cookie, FlowSumsEntry] = Table(pins, "flow_sums")
        self.flows_forgotten: Table[Cookie, Quad] = Table(pins, "flows_forgotten")
        self._flow_totals: Table[Word, FlowEntry] = Table(pins, "flow_totals")
        self._lifetimes: Table[Word, Quad] = Table(pins, "lifetimes")
        self.shadows: Table[ShadowKey, ShadowEntry] = Table(pins, "shadows")
        self.shadow_counts: Table[Cookie, ShadowCountsEntry] = Table(pins, "shadow_counts")
        self.shadow_sums: Table[Cookie, ShadowSumsEntry] = Table(pins, "shadow_sums")
        self.findings: Table[FindingKey, FindingEntry] = Table(pins, "findings")

    @property
    def counters(self) -> "tuple[Table[Cookie, Any], ...]":
        """The maps that count something for each pod."""
        bounded = (self.coverage, self.forgotten, self.flow_sums, self.flows_forgotten)
        return self.traffic, self.tallies, self.lost_handovers, *bounded

    def named(self) -> dict[str, Table[Any, Any]]:
        """The maps with many entries, by name; node, totals and those of steering are left out."""
        return {name: table for name, table in vars(self).items() if name[0] != "_"}

    def node_settings(self) -> NodeEntry:
        """The node's settings as the programs see them now."""
        return self._node.get(Word(0)) or NodeEntry()

    def set_node(self, settings: NodeEntry) -> None:
        """Change the node's settings; the programs follow them at once."""
        self._node.put(Word(0), settings)

    def ztunnels(self) -> frozenset[int]:
        """The ids of the cgroups of the ztunnels that the programs know."""
        return frozenset((self._ztunnels.get(Word(0)) or ZtunnelsEntry()).cgroup) - {0}

    def set_ztunnels(self, cgroups: Collection[int]) -> None:
        """Have the programs take sockets with ztunnel's mark for ztunnel's if they were opened in one of these cgroups.

        There is room for ZTUNNELS. Raises TableFull.
        """
        if len(cgroups) > ZTUNNELS:
            raise TableFull(f"{len(cgroups)} ztunnels run on this node; the BPF map ztunnels has room for {ZTUNNELS}")
        entry = ZtunnelsEntry()
        for slot, cgroup in enumerate(sorted(cgroups)):
            entry.cgroup[slot] = cgroup
        self._ztunnels.put(Word(0), entry)

    def set_kubelet(self, kubelet: KubeletEntry) -> None:
        """Have kubelet's connections reach the applications of pods in ambient mode; an entry of zeroes ends it."""
        self._kubelet.put(Word(0), kubelet)

    def kubelet(self) -> KubeletEntry:
        """Where the programs take kubelet to be; all zero if nowhere."""
        return self._kubelet.get(Word(0)) or KubeletEntry()

    def connection_totals(self) -> dict[tuple[str, str], int]:
        """The number of connections of enrolled pods by (direction, verdict), since the map was made."""
        return {name: (self._totals.get(Word(index)) or Quad()).quad for index, name in enumerate(TOTALS)}

    def passages(self) -> dict[tuple[str, str], int]:
        """What enrolled pods have sent and got past their proxies, and what was refused, by PASSAGES."""
        return {name: (self._passages.get(Word(index)) or Quad()).quad for index, name in enumerate(PASSAGES)}

    def flow_totals(self) -> dict[str, FlowEntry]:
        """The node's closed connections by direction, since the map was made."""
        directions = ("outbound", "inbound")
        return {name: self._flow_totals.get(Word(at)) or FlowEntry() for at, name in enumerate(directions)}

    def lifetimes(self) -> list[int]:
        """The node's closed connections by how long they were open: one number for each of LIFETIMES, and the rest."""
        return [(self._lifetimes.get(Word(index)) or Quad()).quad for index in range(len(LIFETIMES) + 1)]

    def descriptors(self) -> dict[str, int]:
        """The open descriptor of each map by name. A map outlives its pin as long as a descriptor is open."""
        return {table.name: table.descriptor for table in vars(self).values()}

    def ids(self) -> set[int]:
        """The kernel's ids of the maps: whatever program works with one of these is ours."""
        return {int(syscalls.map_info(descriptor).id) for descriptor in self.descriptors().values()}

    def close(self) -> None:
        """Close every descriptor."""
        for descriptor in self.descriptors().values():
            os.close(descriptor)

    def __enter__(self) -> "Tables":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
