"""Other projects' programs on our hooks: at the attach point and at the cgroups above it.

Programs of a cgroup run in the order in which they were attached, and before those of its ancestors. So a socket
load-balancer above us sees the loopback address that we have written, and leaves it alone. But a socket load-balancer
that was attached to our own cgroup earlier turns a Service's address into a pod's before we see it.
"""

import errno
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.hooks import CGROUP_HOOKS, Hook
from bpf.syscalls import Descriptor

OURS = "ss_"  # the names of our programs start with this
_OVERRIDE, _MULTI = 1, 2  # BPF_F_ALLOW_OVERRIDE, BPF_F_ALLOW_MULTI (uapi/linux/bpf.h)


class Mode(StrEnum):
    """How the programs of a hook were attached: beside others, replaceable by a child cgroup's, or exclusively."""

    MULTI = "multi"
    OVERRIDE = "override"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class Foreign:
    """Programs of others on one hook of one cgroup."""

    cgroup: Path
    hook: str
    mode: Mode
    names: tuple[str, ...]  # the kernel keeps 15 characters
    first: bool  # one of them is the first to run on the hook: before our program, or ours is not there yet


def find_foreign(attach_point: Path) -> list[Foreign]:
    """Programs of others on our hooks, at the attach point and its ancestors up to the root of the cgroup2 mount.

    Needs CAP_NET_ADMIN and CAP_SYS_ADMIN. Raises KernelRefused, OSError.
    """
    found = []
    for cgroup in (attach_point, *attach_point.parents):
        if not (cgroup / "cgroup.procs").exists():
            break
        with Descriptor(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            for hook in CGROUP_HOOKS:
                attached = _attached(directory.fd, hook)
                names = tuple(syscalls.program_names(attached.programs))
                others = tuple(name for name in names if not name.startswith(OURS))
                if others:
                    found.append(Foreign(cgroup, hook.name, _mode(attached.flags), others, _is_first(names)))
    return found


def _attached(directory: int, hook: Hook) -> syscalls.Attached:
    """The programs on a hook; none if the kernel does not know the hook, which loading our programs will show."""
    try:
        return syscalls.attached_to(directory, hook.attach_type)
    except KernelRefused as error:
        if error.errno == errno.EINVAL:
            return syscalls.Attached(0, ())
        raise


def _mode(flags: int) -> Mode:
    if flags & _MULTI:
        return Mode.MULTI
    return Mode.OVERRIDE if flags & _OVERRIDE else Mode.EXCLUSIVE


def _is_first(names: tuple[str, ...]) -> bool:
    return not names[0].startswith(OURS)
