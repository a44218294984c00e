"""Examines how much memory this process may use, and whether one before it was killed for want of memory.

kubelet gives each Pod a cgroup and each container one below it, and a limit can be at any of them or above. A process
that the kernel kills at a limit says nothing. So a limit that is too low is told before the compiler starts, and a kill
is told by the next process.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bpf.errors import KernelRefused
from bpf.kernel import mounts
from bpf.trees import is_of_a_pod
from cni.netns.cgroups import Cgroups, NotShown, from_node
from installer.probe.findings import Finding, Presence

# The least limit, in bytes, with which an agent that has to compile should start. Its peak is 170 MiB on two cores with
# Debian 12's BCC, of which the agent is 52 MiB and the empty maps are 24; further cores may hold some pages more.
# tests/node/test_memory.py starts an agent with this limit.
NEEDED = 184 << 20
# the chart's default; docs/operations.md has the reason
ADVISED = "512Mi"
_WHAT, _NEEDED_BY = "memory limit", "compiling the programs"
# a cgroup's limit in bytes, in version 2 and in version 1
_LIMITS = ("memory.max", "memory.limit_in_bytes")
# the hierarchy of version 1 that has the memory controller, in /proc/PID/cgroup (cgroups(7))
_VERSION1 = re.compile(r"^\d+:(?:[^:\n]*,)?memory(?:,[^:\n]*)?:(.*)$", re.M)
# version 1 has no word for "no limit"; it shows the greatest number of whole pages
_NO_LIMIT = 1 << 62

T = TypeVar("T")


def memory(proc: Path) -> Finding:
    """The row on the lowest limit that holds for this process. `proc` is a procfs of the node."""
    try:
        limit = _of_own_cgroups(proc, lowest_limit)
    except (OSError, NotShown, KernelRefused) as error:
        return Finding(_WHAT, _NEEDED_BY, f"not readable: {error}", Presence.WARNING, f"allow {ADVISED} or more")
    if limit is None:
        return Finding(_WHAT, _NEEDED_BY, "none", Presence.YES)
    found = f"{limit / (1 << 20):.0f} MiB"
    if limit >= NEEDED:
        return Finding(_WHAT, _NEEDED_BY, found, Presence.YES)
    advice = f"the compiler would be killed: it takes {NEEDED >> 20} MiB; set resources.limits.memory to {ADVISED}"
    return Finding(_WHAT, _NEEDED_BY, found, Presence.NO, advice)


def earlier_kills(proc: Path) -> int:
    """How many processes of this Pod the kernel has killed for want of memory; 0 if that can't be read.

    The Pod's cgroup outlives its containers. Version 1 of cgroups counts for each cgroup by itself, so what happened in
    an earlier container can't be read there.
    """
    try:
        return _of_own_cgroups(proc, kills)
    except (OSError, NotShown, KernelRefused):
        return 0


def lowest_limit(cgroups: Sequence[Path]) -> int | None:
    """The lowest limit of these cgroups, in bytes; None if there is none. Raises OSError."""
    texts = [(each / name).read_text().strip() for each in cgroups for name in _LIMITS if (each / name).exists()]
    return min((int(text) for text in texts if text != "max" and int(text) < _NO_LIMIT), default=None)


def kills(cgroups: Sequence[Path]) -> int:
    """How many processes were killed in the Pod's cgroup and below, or in the first cgroup if none is a Pod's."""
    events = next((each for each in cgroups if is_of_a_pod(each)), cgroups[0]) / "memory.events"
    lines = events.read_text().splitlines() if events.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _of_own_cgroups(proc: Path, work: Callable[[Sequence[Path]], T]) -> T:
    return from_node(proc, lambda cgroups: work(_own_cgroups(cgroups)))


def _own_cgroups(cgroups: Cgroups) -> list[Path]:
    """The cgroups that limit the memory of this process, its own first. Raises OSError, NotShown."""
    own = Path("/proc/thread-self")
    version1 = _VERSION1.search((own / "cgroup").read_text(errors="surrogateescape"))
    if not version1:
        return _with_those_above(cgroups.of(own).directory)
    for mount in mounts("cgroup"):
        directory = mount.path / version1[1].lstrip("/")
        if (directory / _LIMITS[1]).exists():
            return _with_those_above(directory)
    raise NotShown(f"its memory cgroup is {version1[1]}, which no mount shows")


def _with_those_above(cgroup: Path) -> list[Path]:
    return [cgroup, *(each for each in cgroup.parents if (each / "cgroup.procs").exists())]
