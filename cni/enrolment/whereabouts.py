"""Looks at ADD whether a pod's processes will be where the programs are attached, by what the runtime says.

The runtime names the cgroup in which it is about to start the pod's containers, if it can (containerd from 1.7, CRI-O).
If it does not, nothing is known yet, and the pod's processes are looked for when they run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bpf.attachment import places_of
from bpf.covering import covering
from bpf.errors import KernelRefused, NotAttached
from bpf.kernel import cgroup2_root
from bpf.pins import Pins
from bpf.trees import has_processes, in_version1
from cni.errors import DETACHED, NotCaptured
from cni.protocol import RuntimeConfig


@dataclass(frozen=True)
class Whereabouts:
    """Decides by a pod's cgroup whether the pod can be captured. Safe to use from many threads."""

    pins: Pins
    cover: Callable[[Path], bool]  # attaches where a cgroup's pod is, or raises KernelRefused that says why not
    root: Path  # where cgroup2 is mounted

    @classmethod
    def at_start(cls, pins: Pins, cover: Callable[[Path], bool]) -> "Whereabouts":
        """For the mount of cgroup2 that is visible now. Raises KernelRefused."""
        return cls(pins, cover, cgroup2_root())

    def require(self, pod: str, said: RuntimeConfig) -> None:
        """Raise NotCaptured unless the programs are attached where the runtime says that the pod will be.

        If it says nothing, this returns. If the programs can be attached there, they are. Raises InvalidRequest if what
        it says is no path of a cgroup.
        """
        below = said.cgroup()
        if below is None:
            return
        cgroup = self.root / below
        place = covering(self.pins, self.root, cgroup)
        if place and (cgroup.is_dir() or self._will_be_there(below, place)):
            return
        if not cgroup.is_dir() and (version1 := in_version1(below)):
            raise NotCaptured(
                f"{pod} may run uncaptured: its cgroup is in cgroup v1 alone ({version1}), so where its processes will "
                f"be in cgroup2 is unknown, and the programs are not attached at its root; give --cgroup {self.root}"
            )
        self._extend(pod, cgroup)

    def _extend(self, pod: str, cgroup: Path) -> None:
        """Have the programs attached where the pod will be. Raises NotCaptured."""
        try:
            places = places_of(self.pins)
            if any(map(cgroup.is_relative_to, places)):
                raise NotAttached("a link is gone")
            self.cover(cgroup)
        except NotAttached as error:
            raise NotCaptured(f"{pod} would run uncaptured: {DETACHED}") from error
        except KernelRefused as error:
            at = " or ".join(map(str, places))
            elsewhere = f"its cgroup {cgroup} is not below {at}, where the programs are attached"
            raise NotCaptured(f"{pod} would run uncaptured: {elsewhere}: {error}") from error

    def _will_be_there(self, below: Path, place: Path) -> bool:
        """Whether a cgroup that is not there yet will be made in cgroup2, below the place that covers it.

        A runtime on a hybrid host may use version 1 alone, and an old one leaves processes in the root of cgroup2. But
        if processes are at that place, the runtime puts them there.
        """
        return in_version1(below) is None or place == self.root or has_processes(place)
