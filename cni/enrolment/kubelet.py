"""Tells the programs where kubelet is, so that its probes reach the applications of pods in ambient mode.

Istio's rules give kubelet's packets another source address on their way. Here the programs recognise kubelet's own
sockets by its cgroup. For that they are attached there, beside the cgroups of pods.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from bpf.attachment import attach_also, places_of
from bpf.kernel import cgroup2_root
from bpf.layout import KubeletEntry
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from bpf.trees import is_of_a_pod
from cni.netns.cgroups import Cgroup, Cgroups, NotShown, from_node
from cni.netns.sandbox import own_cookie, visit

log = structlog.get_logger("kubelet")

# names of the processes that kubelet is in: its own, MicroK8s', K3s'
_NAMES = frozenset(("kubelet", "kubelite", "k3s-server", "k3s-agent"))
_UNKNOWN = KubeletEntry()


class Kubelet:
    """Where kubelet is, as the programs know it. `proc` is a procfs of the node."""

    def __init__(self, pins: Pins, tables: Tables, proc: Path = Path("/proc")) -> None:
        self._pins, self._tables, self._proc = pins, tables, proc

    def look(self) -> str:
        """Look where kubelet is now, and tell the programs. Returns why its probes can't pass, "" if they can.

        To be repeated: after a restart kubelet is in another cgroup, which may have the same name. Raises
        KernelRefused, NotAttached.
        """
        entry, problem = self._find()
        if bytes(entry) != bytes(self._tables.kubelet()):
            self._tables.set_kubelet(entry)
            log.info("kubelet.looked_for", cgroup=entry.cgroup, problem=problem)
        return problem

    def _find(self) -> tuple[KubeletEntry, str]:
        for process in self._processes():
            with suppress(OSError, NotShown):
                found: Cgroup = from_node(self._proc, partial(_cgroup_of, process))
                if self._is_of_pods(found.directory):
                    continue
                if problem := self._problem(found.directory):
                    return _UNKNOWN, problem
                with Descriptor(os.open(process / "ns/net", os.O_RDONLY | os.O_CLOEXEC)) as netns:
                    cookie = visit(netns.fd, lambda _: own_cookie())
                attach_also(self._pins, found.directory)
                return KubeletEntry(found.directory.stat().st_ino, cookie), ""
        return _UNKNOWN, f"no process of this node is called {', '.join(sorted(_NAMES))}"

    def _processes(self) -> Iterator[Path]:
        """Those called like kubelet, in the node's own network namespace if that can be seen: kubelet always is."""
        own = None
        with suppress(OSError):
            own = (self._proc / "1/ns/net").stat().st_ino
        for each in sorted(self._proc.glob("[0-9]*")):
            with suppress(OSError):
                if (each / "comm").read_text().strip() in _NAMES and own in (None, (each / "ns/net").stat().st_ino):
                    yield each

    def _is_of_pods(self, cgroup: Path) -> bool:
        """Whether a process that is called like kubelet is a container's, which may choose its name."""
        above, (first, *further) = (cgroup, *cgroup.parents), places_of(self._pins)
        pods = [first, *(place for place in further if place != cgroup)]  # that may be kubelet's own
        return any(map(is_of_a_pod, above)) or any(place in above for place in pods)

    def _problem(self, cgroup: Path) -> str:
        """Why the programs can't be attached at kubelet's cgroup; "" if they can."""
        if cgroup == cgroup2_root():
            return "kubelet is in the root of cgroup2, with everybody else"
        if any(place.is_relative_to(cgroup) for place in places_of(self._pins) if place != cgroup):
            return f"kubelet's cgroup {cgroup} has those of pods below it"
        return ""


def _cgroup_of(process: Path, cgroups: Cgroups) -> Cgroup:
    return cgroups.of(process)
