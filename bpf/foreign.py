"""Other programs on our hooks: whose they are, and whether they leave room."""

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf import syscalls
from bpf.compiler import CGROUP_HOOKS, Hook
from bpf.errors import KernelRefused
from bpf.pins import Descriptor

_ALLOW_MULTI = 2  # uapi/linux/bpf.h, BPF_F_ALLOW_MULTI
_MOST = 64


@dataclass(frozen=True)
class Attached:
    """A program that somebody else has on one of our hooks."""

    hook: Hook
    cgroup: Path
    name: str
    is_exclusive: bool


def foreign_programs(cgroup: Path, root: Path) -> Iterator[Attached]:
    """Everything on our hooks from `cgroup` up to the cgroup2 `root` that isn't ours. Raises KernelRefused."""
    for place in (cgroup, *cgroup.parents):
        with Descriptor(os.open(place, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            for hook in CGROUP_HOOKS:
                flags, ids = _query(directory.fd, hook)
                for program_id in ids:
                    name = _name(program_id)
                    if not name.startswith("ss_"):
                        yield Attached(hook, place, name, not flags & _ALLOW_MULTI)
        if place == root:
            return


def _query(directory: int, hook: Hook) -> tuple[int, list[int]]:
    flags, count, ids = ctypes.c_uint32(), ctypes.c_uint32(_MOST), (ctypes.c_uint32 * _MOST)()
    number = syscalls.query_programs(directory, hook.attach_type, flags, ids, count)
    if number not in (0, errno.ENOSPC):
        raise syscalls.refused("bpf_prog_query", hook.name, number)
    return flags.value, list(ids)[: min(count.value, _MOST)]


def _name(program_id: int) -> str:
    try:
        with Descriptor(syscalls.open_program_id(program_id)) as program:
            return str(syscalls.program_info(program.fd).name.decode()) or f"program {program_id}"
    except KernelRefused:  # gone meanwhile
        return f"program {program_id}"
