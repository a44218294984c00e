"""The bpf(2) calls that the rest of this folder uses, and descriptors that close themselves.

If a call fails, a function raises KernelRefused with the call, its object and errno, or its docstring says otherwise.
"""

import ctypes
import errno
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

from bpf.bytecode import Map
from bpf.errors import KernelRefused
from bpf.libbpf import LIBBPF

# uapi/linux/bpf.h: create or replace an entry; only create it
BPF_ANY, BPF_NOEXIST = 0, 1
# BPF_F_RDONLY: the map's descriptor is for reading only; a read-only bpffs gives no other
READ_ONLY = 1 << 3
# of a verifier's log; until Linux 6.4 it is an error if a log does not fit, and this is the most that can be given
_LOG_BYTES = (1 << 24) - 1
# the most programs that one hook of one cgroup can have: BPF_CGROUP_MAX_PROGS (linux/bpf-cgroup.h)
_PROGRAMS_ASKED = 64

Info = TypeVar("Info", bound=ctypes.Structure)
Buffer = ctypes.Structure | ctypes.Array[Any]


class Descriptor:
    """A file descriptor that is closed at the end of a with block: `with Descriptor(fd) as d: … d.fd …`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor. Must not be called twice."""
        os.close(self.fd)

    def __enter__(self) -> "Descriptor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ObjectOptions(ctypes.Structure):
    """struct bpf_obj_get_opts of libbpf 1.0. `size` tells libbpf which fields the struct has."""

    _fields_ = [("size", ctypes.c_size_t), ("file_flags", ctypes.c_uint32)]


class _LoadOptions(ctypes.Structure):
    """struct bpf_prog_load_opts of libbpf 1.0."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_void_p),
    ]


class _MapOptions(ctypes.Structure):
    """The head of struct bpf_map_create_opts of libbpf 1.0."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    ]


class MapInfo(ctypes.Structure):
    """The head of struct bpf_map_info (uapi/linux/bpf.h)."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
    ]


class ProgramInfo(ctypes.Structure):
    """The head of struct bpf_prog_info (uapi/linux/bpf.h)."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_len", ctypes.c_uint32),
        ("xlated_len", ctypes.c_uint32),
        ("jited_insns", ctypes.c_uint64),
        ("xlated_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("map_count", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    ]


class _LinkTarget(ctypes.Union):
    """The cgroup or namespace that a link is attached to; 0 if it is gone."""

    _fields_ = [("cgroup_id", ctypes.c_uint64), ("netns_inode", ctypes.c_uint32), ("room", ctypes.c_uint8 * 72)]


class LinkInfo(ctypes.Structure):
    """The head of struct bpf_link_info (uapi/linux/bpf.h)."""

    _anonymous_ = ("target",)
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("target", _LinkTarget),
    ]


def refused(call: str, subject: object, number: int) -> KernelRefused:
    """The error for a failed call; `number` is a positive errno."""
    hint = {
        errno.EPERM: "; run as root with CAP_BPF and CAP_NET_ADMIN",
        errno.EBADF: "; give a cgroup2 directory",
        errno.EBUSY: "; another program is attached there exclusively",
    }.get(number, "")
    return KernelRefused(f"{call}({subject}): {os.strerror(number)}{hint}", number)


def _checked(call: str, subject: object, result: int) -> int:
    if result < 0:
        raise refused(call, subject, ctypes.get_errno() or -result)
    return result


def open_pin(path: Path, flags: int = 0) -> int:
    """A file descriptor of the pinned map, program or link at `path`; the caller closes it.

    `flags` are 0 or READ_ONLY; for links only 0.
    """
    options = _ObjectOptions(size=ctypes.sizeof(_ObjectOptions), file_flags=flags)
    return _checked("bpf_obj_get", path, LIBBPF.bpf_obj_get_opts(os.fsencode(path), ctypes.byref(options)))


def pin(fd: int, path: Path) -> None:
    """Pin the object behind `fd` at `path`, which must be on a bpffs and free."""
    _checked("bpf_obj_pin", path, LIBBPF.bpf_obj_pin(fd, os.fsencode(path)))


class Log:
    """Has what the verifier says of a program that it refuses."""

    def __init__(self) -> None:
        self.buffer = (ctypes.c_char * _LOG_BYTES).from_buffer(mmap(-1, _LOG_BYTES))  # takes memory only as it fills

    @property
    def lines(self) -> list[str]:
        """What the verifier has said; no lines if it was not asked."""
        return self.buffer.value.decode(errors="replace").splitlines()


def load_program(
    name: str, kind: int, attach_type: int, code: bytes, maps: Sequence[int], target: int = 0, log: Log | None = None
) -> int:
    """Load a program under the GPL and return its descriptor, which the caller closes.

    `kind` and `attach_type` are the kernel's numbers. `code` refers to maps by their index in `maps`, descriptors.
    `target` is the id of what a tracing program is for in the kernel's types: see iterator_target(). The kernel keeps
    15 characters of `name`.
    """
    descriptors = (ctypes.c_int * len(maps))(*maps)
    options = _LoadOptions(size=ctypes.sizeof(_LoadOptions), expected_attach_type=attach_type, attach_btf_id=target)
    if maps:  # Linux 5.14 or newer
        options.fd_array = ctypes.addressof(descriptors)
    if log:  # log_level 0: libbpf loads the program again with the log if the kernel refuses it
        options.log_buf, options.log_size = ctypes.addressof(log.buffer), _LOG_BYTES
    made = LIBBPF.bpf_prog_load(kind, name.encode(), b"GPL", code, len(code) // 8, ctypes.byref(options))
    return _checked("bpf_prog_load", name, made)


def iterator_target(name: str, attach_type: int) -> int:
    """The id of an iterator, "tcp" for example, in the kernel's types. Loads all of them into memory for it."""
    return _checked("libbpf_find_vmlinux_btf_id", name, LIBBPF.libbpf_find_vmlinux_btf_id(name.encode(), attach_type))


def load_types(btf: bytes) -> int:
    """Load BTF, which describes types of maps' keys and values; the caller closes the descriptor."""
    return _checked("bpf_btf_load", "the maps' types", LIBBPF.bpf_btf_load(btf, len(btf), None))


def types_of(btf_id: int) -> bytes:
    """BTF that is loaded, by its id."""
    types = LIBBPF.btf__load_from_kernel_by_id(btf_id)
    if not types:
        raise refused("btf__load_from_kernel_by_id", btf_id, ctypes.get_errno())
    try:
        size = ctypes.c_uint32()
        return ctypes.string_at(LIBBPF.btf__raw_data(types, ctypes.byref(size)), size.value)
    finally:
        LIBBPF.btf__free(types)


def create_map(name: str, made: Map, types: int) -> int:
    """Make a map and return its descriptor, which the caller closes. `types` is the descriptor of its BTF."""
    options = _MapOptions(size=ctypes.sizeof(_MapOptions), map_flags=made.flags)
    if made.value_type:
        options.btf_fd, options.btf_key_type_id, options.btf_value_type_id = types, made.key_type, made.value_type
    sizes = made.key_size, made.value_size, made.max_entries
    number = LIBBPF.bpf_map_create(made.kind, name.encode(), *sizes, ctypes.byref(options))
    return _checked("bpf_map_create", name, number)


def create_link(program_fd: int, target_fd: int, attach_type: int, subject: object) -> int:
    """Attach a program to a cgroup or network namespace, beside other programs; returns the link's descriptor.

    `attach_type` is of enum bpf_attach_type (uapi/linux/bpf.h). `subject` names the target in an error.
    """
    made = LIBBPF.bpf_link_create(program_fd, target_fd, attach_type, None)
    return _checked("bpf_link_create", subject, made)


def update_link(link_fd: int, program_fd: int, subject: object) -> None:
    """Replace the program of a link in place, so that there is no moment without a program."""
    _checked("bpf_link_update", subject, LIBBPF.bpf_link_update(link_fd, program_fd, None))


def detach_link(link_fd: int, subject: object) -> None:
    """Detach a link from its cgroup or namespace for good, also if other processes or pins still refer to it."""
    _checked("bpf_link_detach", subject, LIBBPF.bpf_link_detach(link_fd))


def create_iterator(link_fd: int) -> int:
    """A descriptor that runs an iterator's program when it is read. It sees the caller's network namespace."""
    return _checked("bpf_iter_create", "an iterator", LIBBPF.bpf_iter_create(link_fd))


def open_raw_tracepoint(name: str, program_fd: int) -> int:
    """Run a program at a tracepoint as long as the returned descriptor is open."""
    made = LIBBPF.bpf_raw_tracepoint_open(name.encode(), program_fd)
    return _checked("bpf_raw_tracepoint_open", name, made)


def attach_to_map(program_fd: int, map_fd: int, attach_type: int, subject: object) -> None:
    """Attach a program to a socket map, in place of the program that is there.

    Sockets that are in the map already keep the program that they entered the map with.
    """
    result = LIBBPF.bpf_prog_attach(program_fd, map_fd, attach_type, 0)
    _checked("bpf_prog_attach", subject, result)


def detach_from_map(program_fd: int, map_fd: int, attach_type: int, subject: object) -> None:
    """Take a program off a socket map. Sockets that are in the map already keep it."""
    _checked("bpf_prog_detach", subject, LIBBPF.bpf_prog_detach2(program_fd, map_fd, attach_type))


def map_ids() -> Iterator[int]:
    """The ids of all maps of this machine. Does not raise: if the kernel refuses, it yields none."""
    following = ctypes.c_uint32(0)
    while LIBBPF.bpf_map_get_next_id(following.value, ctypes.byref(following)) == 0:
        yield following.value


def link_info(link_fd: int) -> LinkInfo:
    """A link's program and target."""
    return _told("link", link_fd, LinkInfo())


def map_info(map_fd: int) -> MapInfo:
    """A map's type, id, name, number of entries, and sizes of key and value in bytes."""
    return _told("map", map_fd, MapInfo())


def program_info(program_fd: int) -> ProgramInfo:
    """A program's type, id, name and number of maps."""
    return _told("program", program_fd, ProgramInfo())


def program_maps(program_fd: int) -> list[int]:
    """The ids of the maps that a program uses."""
    count = program_info(program_fd).map_count
    ids = (ctypes.c_uint32 * count)()
    _told("program", program_fd, ProgramInfo(map_count=count, map_ids=ctypes.addressof(ids)))
    return list(ids)


def uses_map(program_id: int, map_ids: Collection[int]) -> bool:
    """Whether a program uses one of these maps. The errno is ENOENT if it is gone, EPERM without CAP_SYS_ADMIN."""
    with Descriptor(open_program_id(program_id)) as program:
        return any(each in map_ids for each in program_maps(program.fd))


def _told(kind: str, fd: int, info: Info) -> Info:
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _checked("bpf_obj_get_info_by_fd", kind, LIBBPF.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)))
    return info


@dataclass(frozen=True)
class Attached:
    """The programs on one hook of one cgroup or map.

    `flags` are BPF_F_ALLOW_* (uapi/linux/bpf.h), 0 if the program is exclusive. `programs` are ids in running order.
    """

    flags: int
    programs: tuple[int, ...]


def attached_to(target_fd: int, attach_type: int) -> Attached:
    """The programs attached to this map, or to this cgroup itself without its ancestors. Needs CAP_NET_ADMIN."""
    flags, count = ctypes.c_uint32(), ctypes.c_uint32(_PROGRAMS_ASKED)
    ids = (ctypes.c_uint32 * _PROGRAMS_ASKED)()
    places = (ctypes.byref(flags), ids, ctypes.byref(count))
    result = LIBBPF.bpf_prog_query(target_fd, attach_type, 0, *places)
    _checked("bpf_prog_query", f"attach type {attach_type}", result)
    return Attached(flags.value, tuple(ids[: count.value]))


def program_names(ids: Iterable[int]) -> Iterator[str]:
    """The name of each program; the kernel keeps 15 characters. Programs that are gone by now are left out.

    Needs CAP_SYS_ADMIN.
    """
    for number in ids:
        try:
            opened = Descriptor(open_program_id(number))
        except KernelRefused as error:
            if error.errno == errno.ENOENT:
                continue
            raise
        with opened as program:
            yield program_info(program.fd).name.decode(errors="replace")


def open_map_id(map_id: int) -> int:
    """A descriptor of a loaded map; the caller closes it."""
    return _checked("bpf_map_get_fd_by_id", map_id, LIBBPF.bpf_map_get_fd_by_id(map_id))


def open_program_id(program_id: int) -> int:
    """A descriptor of a loaded program; the caller closes it."""
    return _checked("bpf_prog_get_fd_by_id", program_id, LIBBPF.bpf_prog_get_fd_by_id(program_id))


def map_lookup(map_fd: int, key: ctypes.Structure, value: Buffer) -> bool:
    """Read the entry of `key` into `value`; False if there is none."""
    result = LIBBPF.bpf_map_lookup_elem(map_fd, ctypes.byref(key), ctypes.byref(value))
    return _found("bpf_map_lookup_elem", map_fd, result)


def map_update(map_fd: int, key: ctypes.Structure, value: Buffer, flags: int = BPF_ANY) -> int:
    """Create or replace an entry; with BPF_NOEXIST only create it.

    Does not raise but returns a positive errno, or 0. E2BIG: the map is full. EEXIST: there is an entry already.
    """
    result = LIBBPF.bpf_map_update_elem(map_fd, ctypes.byref(key), ctypes.byref(value), flags)
    return (ctypes.get_errno() or -result) if result < 0 else 0


def map_delete(map_fd: int, key: ctypes.Structure) -> bool:
    """Remove an entry; False if there was none."""
    return _found("bpf_map_delete_elem", map_fd, LIBBPF.bpf_map_delete_elem(map_fd, ctypes.byref(key)))


def map_next_key(map_fd: int, key: ctypes.Structure | None, found: ctypes.Structure) -> bool:
    """Write the key after `key` into `found`; None stands before the first key. False at the end."""
    start = None if key is None else ctypes.byref(key)
    return _found("bpf_map_get_next_key", map_fd, LIBBPF.bpf_map_get_next_key(map_fd, start, ctypes.byref(found)))


def _found(call: str, map_fd: int, result: int) -> bool:
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    _checked(call, map_fd, result)
    return True


class Batches:
    """Reads a map in batches of whole buckets.

    Unlike map_next_key, it does not start again if an entry is removed meanwhile. `keys` and `values` hold the entries
    of the last read().
    """

    def __init__(self, map_fd: int, key_bytes: int, value_bytes: int, room: int) -> None:
        """`room` is the most entries of a batch. In a per-CPU map, `value_bytes` are those of all CPUs together."""
        self._map_fd, self._room = map_fd, room
        self._position = ctypes.create_string_buffer(max(key_bytes, 8))
        self._start: ctypes.Array[ctypes.c_char] | None = None
        self.keys = ctypes.create_string_buffer(key_bytes * room)
        self.values = ctypes.create_string_buffer(value_bytes * room)
        self.is_over = False

    def read(self) -> int:
        """Read the next batch; returns its number of entries. If `is_over` is true afterwards, it was the last.

        Raises KernelRefused. Its errno is ENOTSUPP (524) if the kernel cannot read this kind of map in batches.
        """
        count = ctypes.c_uint32(self._room)
        places = (self._start, self._position, self.keys, self.values, ctypes.byref(count), None)
        ctypes.set_errno(0)
        result = LIBBPF.bpf_map_lookup_batch(self._map_fd, *places)
        self.is_over = result < 0 and ctypes.get_errno() == errno.ENOENT
        if not self.is_over and ctypes.get_errno() != errno.EINTR:  # EINTR until 6.12: entries were removed meanwhile
            _checked("bpf_map_lookup_batch", self._map_fd, result)
        self._start = self._position if count.value else self._start
        return int(count.value)
