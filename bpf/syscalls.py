"""The bpf(2) calls that the rest of this folder is made of, and descriptors that close themselves.

Every function raises KernelRefused with the call, its object and errno.
"""

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bpf.errors import KernelRefused
from bpf.libbpf import LIBBPF

# uapi/linux/bpf.h: create or replace; only create
BPF_ANY, BPF_NOEXIST = 0, 1
# BPF_F_RDONLY: a map's descriptor that changes nothing, to be had from a read-only bpffs too
READ_ONLY = 1 << 3
_PROGRAMS_ASKED = 64  # attached to one hook of one cgroup: BPF_CGROUP_MAX_PROGS (linux/bpf-cgroup.h)

Info = TypeVar("Info", bound=ctypes.Structure)
Buffer = ctypes.Structure | ctypes.Array[Any]


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


class _ObjectOptions(ctypes.Structure):
    """struct bpf_obj_get_opts of libbpf 1.0; its size is how libbpf knows which fields there are."""

    _fields_ = [("size", ctypes.c_size_t), ("file_flags", ctypes.c_uint32)]


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
    """Where a link is attached; 0 once the cgroup or namespace is gone."""

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
    """A file descriptor of the pinned map, program or link at `path`; the caller closes it. Links take no flags."""
    options = _ObjectOptions(size=ctypes.sizeof(_ObjectOptions), file_flags=flags)
    return _checked("bpf_obj_get", path, LIBBPF.bpf_obj_get_opts(os.fsencode(path), ctypes.byref(options)))


def pin(fd: int, path: Path) -> None:
    """Pin the object behind `fd` at `path`, which must be on a bpffs and free."""
    _checked("bpf_obj_pin", path, LIBBPF.bpf_obj_pin(fd, os.fsencode(path)))


def create_link(program_fd: int, target_fd: int, attach_type: int, subject: object) -> int:
    """Attach a program to a cgroup or network namespace (multi-attach, never exclusive); returns the link's fd."""
    made = LIBBPF.bpf_link_create(program_fd, target_fd, attach_type, None)
    return _checked("bpf_link_create", subject, made)


def update_link(link_fd: int, program_fd: int, subject: object) -> None:
    """Swap the program of a link in place: no packet or call sees a moment without one."""
    _checked("bpf_link_update", subject, LIBBPF.bpf_link_update(link_fd, program_fd, None))


def open_raw_tracepoint(name: str, program_fd: int) -> int:
    """Have a program run at a tracepoint for as long as the descriptor that this returns is open."""
    made = LIBBPF.bpf_raw_tracepoint_open(name.encode(), program_fd)
    return _checked("bpf_raw_tracepoint_open", name, made)


def attach_to_map(program_fd: int, map_fd: int, attach_type: int, subject: object) -> None:
    """Give a socket map its program, in place of one of ours. Sockets keep that with which they came in."""
    result = LIBBPF.bpf_prog_attach(program_fd, map_fd, attach_type, 0)
    _checked("bpf_prog_attach", subject, result)


def map_ids() -> Iterator[int]:
    """The ids of all loaded maps of this machine."""
    following = ctypes.c_uint32(0)
    while LIBBPF.bpf_map_get_next_id(following.value, ctypes.byref(following)) == 0:
        yield following.value


def link_info(link_fd: int) -> LinkInfo:
    """What a link is and where it is attached."""
    return _told("link", link_fd, LinkInfo())


def map_info(map_fd: int) -> MapInfo:
    """Type, key, value and table size of a map."""
    return _told("map", map_fd, MapInfo())


def program_info(program_fd: int) -> ProgramInfo:
    """What a program is."""
    return _told("program", program_fd, ProgramInfo())


def program_maps(program_fd: int) -> list[int]:
    """The ids of the maps that a program uses."""
    count = program_info(program_fd).map_count
    ids = (ctypes.c_uint32 * count)()
    _told("program", program_fd, ProgramInfo(map_count=count, map_ids=ctypes.addressof(ids)))
    return list(ids)


def _told(kind: str, fd: int, info: Info) -> Info:
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _checked("bpf_obj_get_info_by_fd", kind, LIBBPF.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)))
    return info


@dataclass(frozen=True)
class Attached:
    """What one hook of one cgroup has: how it was attached (BPF_F_ALLOW_*, 0 is exclusive) and ids in running order."""

    flags: int
    programs: tuple[int, ...]


def attached_to(target_fd: int, attach_type: int) -> Attached:
    """The programs attached to this very cgroup, without its ancestors', or to this map. Needs CAP_NET_ADMIN."""
    flags, count = ctypes.c_uint32(), ctypes.c_uint32(_PROGRAMS_ASKED)
    ids = (ctypes.c_uint32 * _PROGRAMS_ASKED)()
    places = (ctypes.byref(flags), ids, ctypes.byref(count))
    result = LIBBPF.bpf_prog_query(target_fd, attach_type, 0, *places)
    _checked("bpf_prog_query", f"attach type {attach_type}", result)
    return Attached(flags.value, tuple(ids[: count.value]))


def program_names(ids: Iterable[int]) -> Iterator[str]:
    """The name of each program (the kernel keeps 15 characters); one that went away meanwhile is left out.

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
    """Read the entry of `key` into `value`; False when there is none."""
    result = LIBBPF.bpf_map_lookup_elem(map_fd, ctypes.byref(key), ctypes.byref(value))
    return _found("bpf_map_lookup_elem", map_fd, result)


def map_update(map_fd: int, key: ctypes.Structure, value: Buffer, flags: int = BPF_ANY) -> int:
    """Create or replace an entry, or with BPF_NOEXIST only create it.

    Returns 0 or the errno, of which callers know E2BIG (full), ENOMEM and EEXIST.
    """
    result = LIBBPF.bpf_map_update_elem(map_fd, ctypes.byref(key), ctypes.byref(value), flags)
    return (ctypes.get_errno() or -result) if result < 0 else 0


def map_delete(map_fd: int, key: ctypes.Structure) -> bool:
    """Remove an entry; False when there was none."""
    return _found("bpf_map_delete_elem", map_fd, LIBBPF.bpf_map_delete_elem(map_fd, ctypes.byref(key)))


def map_next_key(map_fd: int, key: ctypes.Structure | None, found: ctypes.Structure) -> bool:
    """Step to the key after `key` (None: the first); False at the end."""
    start = None if key is None else ctypes.byref(key)
    return _found("bpf_map_get_next_key", map_fd, LIBBPF.bpf_map_get_next_key(map_fd, start, ctypes.byref(found)))


def _found(call: str, map_fd: int, result: int) -> bool:
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    _checked(call, map_fd, result)
    return True


class Batches:
    """Reads a map in batches of whole buckets: unlike map_next_key it does not begin anew when an entry goes meanwhile.

    `keys` and `values` hold what the last read() has found.
    """

    def __init__(self, map_fd: int, key_bytes: int, value_bytes: int, room: int) -> None:
        """`value_bytes` of an entry are those of all CPUs; `room` is in entries."""
        self._map_fd, self._room = map_fd, room
        self._position = ctypes.create_string_buffer(max(key_bytes, 8))
        self._start: ctypes.Array[ctypes.c_char] | None = None
        self.keys = ctypes.create_string_buffer(key_bytes * room)
        self.values = ctypes.create_string_buffer(value_bytes * room)
        self.is_over = False

    def read(self) -> int:
        """How many entries there are now, the last ones once `is_over`. Raises KernelRefused, also for ENOTSUPP."""
        count = ctypes.c_uint32(self._room)
        places = (self._start, self._position, self.keys, self.values, ctypes.byref(count), None)
        ctypes.set_errno(0)
        result = LIBBPF.bpf_map_lookup_batch(self._map_fd, *places)
        self.is_over = result < 0 and ctypes.get_errno() == errno.ENOENT
        if not self.is_over and ctypes.get_errno() != errno.EINTR:  # until 6.12: entries went meanwhile
            _checked("bpf_map_lookup_batch", self._map_fd, result)
        self._start = self._position if count.value else self._start
        return int(count.value)
