"""Finds the processes in given network namespaces, and the cgroup of each, in one walk of /proc for all of them."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bpf.errors import KernelRefused
from cni.netns.cgroups import Cgroup, Cgroups, NotShown, from_node
from cni.netns.namespaces import missing_rights

# Errors for a process that has ended, or is ending.
_GONE = (FileNotFoundError, ProcessLookupError, NotADirectoryError)


class Resident(NamedTuple):
    """A process in a network namespace: its id as the node has it, the namespace's inode, and its cgroup."""

    pid: int
    inode: int
    cgroup: Cgroup


@dataclass
class Residents:
    """The processes of some network namespaces, by the namespace's inode.

    `unknown` says why there may be more processes, or why nothing is known; "" if these are all.
    """

    found: dict[int, list[Resident]] = field(default_factory=dict)
    unknown: str = ""


def residents(proc: Path, inodes: Collection[int], pids: Collection[int] | None = None) -> Residents:
    """The processes of the namespaces with these inodes, or only those of `pids`. `proc` is a procfs of the node.

    Needs CAP_SYS_PTRACE, to see the namespaces of other users' processes. A process has the namespace of its first
    thread; if only that one has ended, of another thread.
    """
    if not inodes:
        return Residents()
    if missing := missing_rights():
        return Residents(unknown=f"without {' and '.join(missing)}; run as root with all capabilities")
    try:
        return from_node(proc, partial(_walk, _processes(proc, pids), frozenset(inodes)))
    except OSError as error:
        return Residents(unknown=f"{error.filename or proc}: {error.strerror}; give a procfs of the node with --proc")
    except KernelRefused as error:
        return Residents(unknown=str(error))


def name_of(proc: Path, resident: Resident) -> str | None:
    """The process's name (proc_pid_comm(5), at most 15 letters); None if it has ended or has left the namespace."""
    process = proc / str(resident.pid)
    try:
        name = (process / "comm").read_text(errors="replace").removesuffix("\n")
        # By now the id may be another process's.
        if _namespace(process) != resident.inode:
            return None
    except OSError:
        return None
    return "".join(each if each.isprintable() else "?" for each in name)


def is_blind(proc: Path, populated: Iterable[Path]) -> bool:
    """Whether `proc` shows the processes of one container only, and not those in and below these cgroups.

    It does if it is a procfs of this process's own pid namespace, and the kernel lists a process of those cgroups as 0:
    one that this pid namespace does not have (cgroup.procs, Documentation/admin-guide/cgroup-v2.rst).
    """
    with suppress(OSError):
        ids = next(line for line in (proc / "self/status").read_text().splitlines() if line.startswith("NSpid:"))
        return len(ids.split()) == 2 and any("0" in _processes_in(each) for top in populated for each in _tree(top))
    return True


def _tree(top: Path) -> Iterator[Path]:
    return (Path(directory) for directory, _, _ in os.walk(top))


def _processes_in(cgroup: Path) -> list[str]:
    with suppress(OSError):  # it has gone, or is a threaded one, whose processes are listed above it
        return (cgroup / "cgroup.procs").read_text().split()
    return []


def _walk(processes: Iterable[Path], inodes: frozenset[int], cgroups: Cgroups) -> Residents:
    whole = Residents()
    for process in processes:
        try:
            inode = _namespace(process)
            if inode in inodes:
                resident = Resident(int(process.name), inode, _cgroup(process, cgroups))
                whole.found.setdefault(inode, []).append(resident)
        except _GONE:
            continue
        except (OSError, NotShown) as error:
            if process.is_dir():  # the kernel says EACCES, too, if the process ends at that moment
                whole.unknown = f"{process}: {getattr(error, 'strerror', None) or error}"
    return whole


def _processes(proc: Path, pids: Collection[int] | None) -> Iterable[Path]:
    """The directories of processes; by default of all but the first, which is in no pod and may be closed to us."""
    if pids is not None:
        return [proc / str(pid) for pid in pids]
    return (each for each in proc.iterdir() if each.name.isdigit() and each.name != "1")


def _namespace(process: Path) -> int:
    """The inode of a process's network namespace."""
    try:
        return (process / "ns/net").stat().st_ino
    except FileNotFoundError:
        # The first thread has ended: the process is a zombie, unless other threads go on.
        for thread in (process / "task").iterdir():
            with suppress(FileNotFoundError):
                return (thread / "ns/net").stat().st_ino
        raise


def _cgroup(process: Path, cgroups: Cgroups) -> Cgroup:
    try:
        return cgroups.of(process)
    except FileNotFoundError:
        return cgroups.of(process)  # it has moved meanwhile, and the cgroup that it was in has gone
