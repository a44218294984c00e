"""Stray processes: those in an enrolled pod's network namespace that run in no cgroup where programs are attached.

The programs of a cgroup see the sockets of the processes in this cgroup and below it. So nothing captures what a stray
process sends: its connections and its DNS queries go directly, and denied ports are open to it. Inbound connections
are steered by the namespace's own link, so they are captured wherever the process runs that listens.
"""

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bpf.attachment import attached_cgroups, detached, places_of
from bpf.errors import SidestepError
from bpf.hooks import DECIDING
from bpf.kernel import cgroup2_root
from bpf.layouts import layouts, steered
from bpf.pins import Pins
from cni.netns.namespaces import find_netns
from cni.netns.residents import Resident, Residents, is_blind, name_of, residents

STRAYS = "stray processes, whose outbound connections are not captured"
NOT_KNOWN = "stray processes: unknown"
_SHOWN = 3  # processes in a sentence
_VISIT_SECONDS = 0.05  # a visit to a namespace takes milliseconds


class Stray(NamedTuple):
    """A stray process, with its name and the path of its cgroup."""

    pid: int
    name: str
    cgroup: str

    def __str__(self) -> str:
        return f"{self.pid} {self.name} (cgroup {self.cgroup})"

    def directory(self) -> Path:
        """The directory of its cgroup. Raises KernelRefused if cgroup2 is not mounted."""
        return cgroup2_root() / self.cgroup.lstrip("/")


@dataclass(frozen=True)
class PodProcesses:
    """Where the processes of one pod run.

    `found` are all that were seen, `inside` those of them that the programs see. `unknown` says why there may be more
    of either kind; "" if these are all.
    """

    found: tuple[Resident, ...] = ()
    inside: tuple[Resident, ...] = ()
    strays: tuple[Stray, ...] = ()
    unknown: str = ""

    @property
    def is_open(self) -> bool:
        """Whether there are processes that nothing captures, or may be."""
        return bool(self.strays or self.unknown)

    @property
    def are_all_strays(self) -> bool:
        """Whether there are processes, and the programs see none of them."""
        return bool(self.strays) and not self.inside

    @property
    def words(self) -> str:
        """What there is to say: which processes are strays, and why others are unknown; "" if there is nothing."""
        unknown = f"{NOT_KNOWN}: {self.unknown}" if self.unknown else ""
        return "; ".join(filter(None, (told_of(self.strays), unknown)))

    @property
    def brief(self) -> str:
        """The same where there is little room."""
        return f"stray processes: {len(self.strays) or 'unknown'}" if self.is_open else ""

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        strays = [each._asdict() for each in self.strays]
        return {"captured": len(self.inside), "strays": strays, "unknown": self.unknown}


NO_STRAYS = PodProcesses()


def told_of(strays: Sequence[Stray]) -> str:
    """A sentence about stray processes that names the first of them; "" if there are none."""
    few = [str(each) for each in strays[:_SHOWN]]
    more = [f"{len(strays) - _SHOWN} more"] if len(strays) > _SHOWN else []
    return f"{STRAYS}: {', '.join([*few, *more])}" if strays else ""


def processes_of(pins: Pins, cookies: Collection[int], proc: Path) -> dict[int, PodProcesses]:
    """Where the processes of each of these pods run now. One walk of `proc`, a procfs of the node, serves all pods."""
    try:
        attached, inodes = attached_cgroups(pins, DECIDING), _inodes_of(pins, cookies, proc)
    except (OSError, SidestepError) as error:
        return dict.fromkeys(cookies, PodProcesses(unknown=str(error)))
    seen = residents(proc, set(inodes.values()))
    unknown = seen.unknown
    if not attached:
        unknown = _why_unattached(pins)
    elif not (unknown or seen.found) and inodes:
        unknown = _why_nobody(pins, proc)
    strays = _confirmed(seen, attached, proc) if attached else []

    def of(inode: int) -> PodProcesses:
        found = tuple(seen.found.get(inode, ()))
        inside = tuple(each for each in found if not _is_outside(each, attached))
        return PodProcesses(found, inside, tuple(stray for at, stray in strays if at == inode), unknown)

    return {cookie: of(inodes.get(cookie, 0)) for cookie in cookies}


def _confirmed(seen: Residents, attached: frozenset[int], proc: Path) -> list[tuple[int, Stray]]:
    """The stray processes among those seen that still are, a moment later, each with its namespace's inode.

    A process that enters the namespace for a moment is none: CNI plugins do, and so do sidestep's own commands. A
    runtime brings a process into the namespace first and into the container's cgroup then.
    """
    first = [each for found in seen.found.values() for each in found if _is_outside(each, attached)]
    if not first:
        return []
    time.sleep(_VISIT_SECONDS)
    again = residents(proc, {each.inode for each in first}, [each.pid for each in first]).found
    still = [each for found in again.values() for each in found if _is_outside(each, attached)]
    named = ((each, name_of(proc, each)) for each in still)
    return [(each.inode, Stray(each.pid, name, each.cgroup.path)) for each, name in named if name is not None]


def _is_outside(process: Resident, attached: frozenset[int]) -> bool:
    return process.cgroup.lineage.isdisjoint(attached)


def _why_unattached(pins: Pins) -> str:
    """Why there is no cgroup whose processes the programs see."""
    gone = detached(pins)
    if not gone:
        return "there is no cgroup where the deciding programs are attached together"
    return f"{', '.join(name for name in DECIDING if name in gone)} not attached"


def _why_nobody(pins: Pins, proc: Path) -> str:
    """Why `proc` shows no process of any pod; "" if there is none."""
    try:
        is_elsewhere = is_blind(proc, places_of(pins))
    except SidestepError as error:
        return str(error)
    return f"{proc} does not show the processes of pods; give a procfs of the node with --proc" if is_elsewhere else ""


def _inodes_of(pins: Pins, cookies: Collection[int], proc: Path) -> dict[int, int]:
    """The inodes of these pods' namespaces, by cookie. A namespace that is not found has no process.

    Their links tell them. Namespaces without a link are looked for. Raises OSError, NoProcfs, KernelRefused.
    """
    linked = {cookie: inode for layout in layouts(pins) for cookie, inode in steered(layout).items()}
    found = {cookie: linked[cookie] for cookie in cookies if cookie in linked}
    if lost := set(cookies) - found.keys():
        with find_netns(lost, proc=proc) as namespaces:
            found |= {cookie: os.fstat(netns).st_ino for cookie, netns in namespaces}
    return found
