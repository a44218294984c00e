"""Which processes of the node are in which network namespace and which containers: one walk of /proc."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# how containerd and CRI-O name containers, in cgroup paths as in a Pod's status
_CONTAINER_ID = re.compile(r"[0-9a-f]{32,64}")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)


@dataclass
class Crowd:
    """The processes of one network namespace; `containers` are the ids in their cgroups' paths, oldest first."""

    inode: int
    pids: list[int] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)


def crowds(proc: Path) -> dict[int, Crowd]:
    """By the inode of the namespace; the node's own is left out. `proc` is a procfs of the node.

    Takes CAP_SYS_PTRACE to see other users' processes. Processes that end meanwhile are left out.
    """
    own = set(_own(proc))
    found: dict[int, Crowd] = {}
    for pid in sorted(_pids(proc)):  # the oldest is usually the sandbox's
        try:
            inode = (proc / str(pid) / "ns/net").stat().st_ino
            if inode in own:
                continue
            ids = _CONTAINER_ID.findall((proc / str(pid) / "cgroup").read_text())
        except _GONE:
            continue
        crowd = found.setdefault(inode, Crowd(inode))
        crowd.pids.append(pid)
        crowd.containers += [each for each in dict.fromkeys(ids) if each not in crowd.containers]
    return found


def open_netns(proc: Path, crowd: Crowd) -> int | None:
    """A descriptor of the crowd's namespace; None when everybody has left it. The caller closes it."""
    for pid in crowd.pids:
        try:
            opened = os.open(proc / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except _GONE:
            continue
        if os.fstat(opened).st_ino == crowd.inode:
            return opened
        os.close(opened)  # the number is another process's by now
    return None


def _own(proc: Path) -> Iterator[int]:
    """The namespace of this process and that of the node's first process, which may be out of sight in a sandbox."""
    for name in ("self", "1"):
        with suppress(*_GONE):
            yield (proc / name / "ns/net").stat().st_ino


def _pids(proc: Path) -> Iterator[int]:
    for entry in proc.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)
