"""Which processes of the node are in which network namespace and which containers: one walk of /proc."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# How containerd and CRI-O name containers, in cgroup paths as in a Pod's status. A static pod's UID has 32 such digits.
_CONTAINER_ID = re.compile(r"(?<!pod)[0-9a-f]{32,64}")
# how kubelet names a pod's cgroup: its systemd driver writes the UID with underscores
_POD_UID = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})")
# a process or mount that went away meanwhile, or one that is not ours to look into; not EMFILE and its like
GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)


@dataclass
class Crowd:
    """The processes of one network namespace, with the containers and pods that their cgroups' paths name.

    The oldest process comes first, and so does its container.
    """

    inode: int
    pids: list[int] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    pod_uids: set[str] = field(default_factory=set)


def crowds(proc: Path) -> dict[int, Crowd]:
    """By the inode of the namespace, the longest inhabited first; the node's own is left out.

    `proc` is a procfs of the node. Takes CAP_SYS_PTRACE to see other users' processes. Those that end meanwhile are
    left out.
    """
    own = set(_own(proc))
    found: dict[int, Crowd] = {}
    seen = []
    for pid in _pids(proc):
        try:
            inode = (proc / str(pid) / "ns/net").stat().st_ino
            if inode not in own:
                seen.append((_started(proc, pid), pid, inode))
        except GONE:
            continue
    outer = set(_containers(_cgroups(proc, "self") + _cgroups(proc, "1")))  # the node may be a container itself
    for _, pid, inode in sorted(seen):  # ids of processes are used again, so they do not tell who is older
        paths = _cgroups(proc, str(pid))
        if paths:
            crowd = found.setdefault(inode, Crowd(inode))
            crowd.pids.append(pid)
            crowd.containers += [each for each in _containers(paths) if each not in (*outer, *crowd.containers)]
            crowd.pod_uids.update(each.replace("_", "-") for each in _POD_UID.findall(paths))
    return found


def netns_of_crowd(proc: Path, crowd: Crowd) -> int | None:
    """A descriptor of the crowd's namespace; None when everybody has left it. The caller closes it."""
    for pid in crowd.pids:
        try:
            opened = os.open(proc / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except GONE:
            continue
        if os.fstat(opened).st_ino == crowd.inode:
            return opened
        os.close(opened)  # the number is another process's by now
    return None


def _cgroups(proc: Path, pid: str) -> str:
    """A line a hierarchy, with the path; empty when the process is gone."""
    with suppress(*GONE):
        return (proc / pid / "cgroup").read_text()
    return ""


def _containers(paths: str) -> list[str]:
    """The innermost container of each path."""
    ids = (_CONTAINER_ID.findall(line)[-1:] for line in paths.splitlines())
    return list(dict.fromkeys(each for line in ids for each in line))


def _own(proc: Path) -> Iterator[int]:
    """The namespace of this process and that of the node's first process, which may be out of sight in a sandbox."""
    for name in ("self", "1"):
        with suppress(*GONE):
            yield (proc / name / "ns/net").stat().st_ino


def _pids(proc: Path) -> Iterator[int]:
    for entry in proc.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _started(proc: Path, pid: int) -> int:
    """Clock ticks from boot to the process's start: proc_pid_stat(5), field 22; the name in field 2 may have blanks."""
    return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
