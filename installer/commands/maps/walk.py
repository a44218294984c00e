"""Every entry of a pinned map, one by one and in bounded memory, of any kind that user space can read."""

import ctypes
import errno
from collections.abc import Iterator
from dataclasses import dataclass

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.kernel import possible_cpus
from bpf.layout import TABLES
from bpf.pins import Descriptor, Pins

# enum bpf_map_type (uapi/linux/bpf.h), as far as we have such maps
KINDS = {
    1: "hash",
    2: "array",
    5: "percpu_hash",
    6: "percpu_array",
    9: "lru_hash",
    11: "lpm_trie",
    18: "sockhash",
    24: "sk_storage",
    27: "ringbuf",
}
_EACH_CPU = ("percpu_hash", "percpu_array")
_ROOM = 256  # entries a read
_NO_BATCHES = (524, errno.EOPNOTSUPP, errno.EINVAL)  # ENOTSUPP of the kernel; what older ones say

Entry = tuple[ctypes.Structure, ctypes.Structure]


@dataclass(frozen=True)
class _Shape:
    """What an entry is made of, in bytes and in types."""

    key: type[ctypes.Structure]
    value: type[ctypes.Structure]
    cpus: int  # how many values an entry has; their sum is meant. 0: one, which is no counter

    @property
    def value_bytes(self) -> int:
        """Of one entry; each CPU's own value is padded to eight bytes."""
        size = ctypes.sizeof(self.value)
        return -(-size // 8) * 8 * self.cpus if self.cpus else size

    def value_of(self, raw: bytes) -> ctypes.Structure:
        """One value, of per-CPU counters the sum."""
        if not self.cpus:
            return self.value.from_buffer_copy(raw)
        counters = ctypes.sizeof(self.value) // 8
        row = ((ctypes.c_uint64 * counters) * self.cpus).from_buffer_copy(raw)
        return self.value.from_buffer_copy((ctypes.c_uint64 * counters)(*map(sum, zip(*row, strict=True))))


def entries(pins: Pins, name: str) -> Iterator[Entry]:
    """Every key with its value; what comes or goes meanwhile may be missing. Raises NotAttached, KernelRefused."""
    with Descriptor(pins.open_map(name)) as table:
        info = syscalls.map_info(table.fd)
        shape = _Shape(*TABLES[name], possible_cpus() if KINDS.get(info.type) in _EACH_CPU else 0)
        try:
            yield from _batches(table.fd, shape)
        except KernelRefused as error:
            if getattr(error, "errno", 0) not in _NO_BATCHES:
                raise
            yield from _steps(table.fd, shape, info.max_entries)


def _batches(fd: int, shape: _Shape) -> Iterator[Entry]:
    key_bytes, value_bytes = ctypes.sizeof(shape.key), shape.value_bytes
    batches = syscalls.Batches(fd, key_bytes, value_bytes, _ROOM)
    while not batches.is_over:
        found = batches.read()
        keys, values = batches.keys.raw, batches.values.raw
        for at in range(found):
            key = shape.key.from_buffer_copy(keys, at * key_bytes)
            yield key, shape.value_of(values[at * value_bytes : (at + 1) * value_bytes])


def _steps(fd: int, shape: _Shape, limit: int) -> Iterator[Entry]:
    """Key by key: when one goes meanwhile the kernel begins anew, so the walk is bounded by what the map can hold."""
    current: ctypes.Structure | None = None
    row = ctypes.create_string_buffer(shape.value_bytes)
    for _ in range(limit):
        following = shape.key()
        if not syscalls.map_next_key(fd, current, following):
            return
        if syscalls.map_lookup(fd, following, row):
            yield following, shape.value_of(row.raw)
        current = following
