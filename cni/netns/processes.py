"""Groups the node's processes by network namespace, with their containers and pods, in one walk of /proc."""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# A container's id from containerd or CRI-O, in a cgroup path. A static pod's UID has 32 such digits too, after "pod".
_CONTAINER_ID = re.compile(r"(?<!pod)[0-9a-f]{32,64}")
# A pod's UID in the name that kubelet gives the pod's cgroup. With the systemd driver it has underscores for hyphens.
_POD_UID = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})")
# Errors for a process or mount that is gone by now, or that we may not look into. Others (EMFILE, say) are faults.
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

    def is_of(self, uid: str | None, containers: Collection[str]) -> bool:
        """Whether these are the processes of the pod with this UID, or with these containers."""
        return uid in self.pod_uids or not set(containers).isdisjoint(self.containers)


def crowds(proc: Path) -> dict[int, Crowd]:
    """The crowds of the node by the inode of their namespace, the one with the oldest process first.

    The namespaces of the node and of this process are left out, and so are processes that end meanwhile. `proc` is a
    procfs of the node. Needs CAP_SYS_PTRACE to see other users' processes.
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
    for _, pid, inode in sorted(seen):  # by start time: process ids are used again, so they do not tell the age
        paths = _cgroups(proc, str(pid))
        if paths:
            crowd = found.setdefault(inode, Crowd(inode))
            crowd.pids.append(pid)
            crowd.containers += [each for each in _containers(paths) if each not in (*outer, *crowd.containers)]
            crowd.pod_uids.update(each.replace("_", "-") for each in _POD_UID.findall(paths))
    return found


def netns_of_crowd(proc: Path, crowd: Crowd) -> int | None:
    """A descriptor of the crowd's namespace, which the caller closes; None if all its processes have left it."""
    for pid in crowd.pids:
        try:
            opened = os.open(proc / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except GONE:
            continue
        if os.fstat(opened).st_ino == crowd.inode:
            return opened
        os.close(opened)  # another process has this id by now, or the process has changed its namespace
    return None


def _cgroups(proc: Path, pid: str) -> str:
    """The text of a process's cgroup file, with one path a line. Empty if the process is gone."""
    with suppress(*GONE):
        return (proc / pid / "cgroup").read_text()
    return ""


def _containers(paths: str) -> list[str]:
    """The id of the innermost container in each path, each once."""
    ids = (_CONTAINER_ID.findall(line)[-1:] for line in paths.splitlines())
    return list(dict.fromkeys(each for line in ids for each in line))


def _own(proc: Path) -> Iterator[int]:
    """The inodes of the network namespaces of this process and of the node's first process, if they can be read."""
    for name in ("self", "1"):
        with suppress(*GONE):
            yield (proc / name / "ns/net").stat().st_ino


def _pids(proc: Path) -> Iterator[int]:
    for entry in proc.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _started(proc: Path, pid: int) -> int:
    """When a process started, in clock ticks since boot: field 22 of proc_pid_stat(5).

    The name in field 2 may have blanks, so fields are counted from behind its closing bracket.
    """
    return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
