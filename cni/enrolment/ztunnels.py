"""Tells the programs which cgroups are those of the node's ztunnels.

A socket of a pod in ambient mode is ztunnel's if it has ztunnel's mark and was opened in one of these cgroups. So a
ztunnel has to be learned before it is told of the first pod: it can't open a socket in a pod that it does not know.
While a ztunnel is replaced there are two. One that has lost its connection to the agent goes on working, so only those
are forgotten whose cgroup has gone.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from bpf.kernel import cgroup2_root
from bpf.tables import Tables
from cni.netns.cgroups import Cgroup, from_node

log = structlog.get_logger("ztunnels")

# where the runtime puts containers into hierarchies of cgroup version 1
_BY_MARK_ALONE = "all containers are in the root of cgroup2, so whoever sets ztunnel's mark passes for ztunnel"


class Ztunnels:
    """The cgroups of the node's ztunnels. Safe to use from many threads.

    `places` are the cgroup2 directories that have the cgroups of all pods below them. `proc` is a procfs of the node.
    """

    def __init__(self, tables: Tables, places: Callable[[], Iterable[Path]], proc: Path = Path("/proc")) -> None:
        self._tables, self._places, self._proc = tables, places, proc
        self._lock = threading.Lock()

    def known(self) -> frozenset[int]:
        """The ids of the cgroups that the programs know."""
        return self._tables.ztunnels()

    def learn(self, pid: int) -> int:
        """Take the container of a process for a ztunnel. Returns the id of its cgroup.

        `pid` is the process's id as `proc` has it. Raises OSError if the process has gone, NotShown, KernelRefused, and
        TableFull if there are more ztunnels than there is room for.
        """
        found: Cgroup = from_node(self._proc, lambda cgroups: cgroups.of(self._proc / str(pid)))
        cgroup = found.directory.stat().st_ino
        with self._lock:
            known = self._tables.ztunnels()
            if cgroup not in known:
                self._tables.set_ztunnels(self._living(known) | {cgroup})
                log.info("ztunnel.known", cgroup=found.path, pid=pid)
                if found.directory == cgroup2_root():
                    log.warning("ztunnel.not_told_apart", cgroup=found.path, consequence=_BY_MARK_ALONE)
        return cgroup

    def forget_gone(self) -> frozenset[int]:
        """Forget those whose cgroups have gone, and return their ids. Raises KernelRefused."""
        with self._lock:
            known = self._tables.ztunnels()
            living = self._living(known)
            if living != known:
                self._tables.set_ztunnels(living)
        return known - living

    def _living(self, known: frozenset[int]) -> frozenset[int]:
        if not known:
            return known
        return known & frozenset(_ids_below(self._places()))


def _ids_below(places: Iterable[Path]) -> Iterator[int]:
    """The ids of all cgroups below some places."""
    for directory, _, _ in (found for place in places for found in os.walk(place)):
        with suppress(OSError):  # it has gone meanwhile
            yield Path(directory).stat().st_ino
