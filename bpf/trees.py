"""Where pods are in cgroup2: kubelet's trees on this machine, and the cgroups to attach at so that pods are below.

Nothing is taken for granted by a name alone. Kubelet and the container runtime may use different cgroup drivers, a tree
may be left over from an earlier configuration, and kubelet may run in a container of its own (kind, k3d). So every tree
is looked at: whether processes are in it, and whether pods have cgroups there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf.kernel import cgroup2_root, mounts

# kubelet's cgroup with the drivers cgroupfs and systemd; with kubelet's setting cgroupRoot, the slice has a prefix
_TREES = ("kubepods", "kubepods.slice")
_PREFIXED = "-kubepods.slice"
# levels below the root at which a tree may be: system.slice/docker-ID.scope/kubelet.slice/kubelet-kubepods.slice
_DEEPEST = 4
# a Pod's UID in the name of its cgroup: with dashes, with underscores (systemd), or of a static pod (only digits)
_POD = re.compile(r"pod[0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12}")


@dataclass(frozen=True)
class Tree:
    """One of kubelet's cgroups for all pods: its directory, and what is below it."""

    path: Path
    has_processes: bool
    has_pods: bool  # pods have cgroups there, with or without processes

    @property
    def is_inhabited(self) -> bool:
        """Whether anything of a pod is there."""
        return self.has_processes or self.has_pods


@dataclass(frozen=True)
class Choice:
    """The cgroups to attach at, the first one before the others, and why these."""

    first: Path
    why: str
    further: tuple[Path, ...] = ()
    is_given: bool = False  # by the settings: then nothing is attached elsewhere

    @property
    def every(self) -> tuple[Path, ...]:
        """All cgroups to attach at."""
        return self.first, *self.further


def choose() -> Choice:
    """The cgroups to attach at, by where pods are now. Raises KernelRefused if cgroup2 is not mounted.

    At kubelet's cgroup, host daemons do not run the programs. Also, programs of a child cgroup run before those of the
    root. So our programs see a Service's address before a socket load-balancer at the root rewrites it.
    """
    root = cgroup2_root()
    found = kubelets_trees()
    version1 = version1_tree()
    inhabited = [each for each in found if each.has_processes] or [each for each in found if each.has_pods]
    if inhabited:
        first, *further = (each.path for each in inhabited)
        why = "where pods' processes are" if inhabited[0].has_processes else "where pods have cgroups"
        return Choice(first, why, tuple(further))
    if version1:
        empty = "".join(f"{each.path} is empty, and " for each in found)
        return Choice(root, f"the root: {empty}kubelet's pods are in cgroup v1 ({version1})")
    if not found:
        return Choice(root, "the root: kubelet has no cgroup2 there")
    first, *further = (each.path for each in found)
    return Choice(first, "where no pod is yet", tuple(further))


def kubelets_trees() -> tuple[Tree, ...]:
    """Kubelet's trees on this machine, those nearer to the root first. Raises KernelRefused without cgroup2."""
    return tuple(_trees(cgroup2_root()))


def is_inhabited(cgroup: Path) -> bool:
    """Whether a process is in a cgroup or below it, or pods have cgroups there."""
    return has_processes(cgroup) or _has_pods(cgroup)


def given(cgroup: Path) -> Choice:
    """The choice that the settings have made."""
    return Choice(cgroup, "given by --cgroup", is_given=True)


def has_processes(cgroup: Path) -> bool:
    """Whether a process is in a cgroup or below it. The root has always some."""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text().splitlines()
    except FileNotFoundError:  # the root has no such file
        return (cgroup / "cgroup.procs").exists()
    except OSError:  # it went meanwhile
        return False


def place_for(cgroup: Path) -> Path | None:
    """The cgroup to attach at so that the pod in `cgroup`, its own or its container's, is below. Never the root: None.

    It is kubelet's tree if there is one above. If not, it is the cgroup that has the pod's, and others', below it.
    Raises KernelRefused if cgroup2 is not mounted.
    """
    root = cgroup2_root()
    if cgroup == root or not cgroup.is_relative_to(root):
        return None
    way = [each for each in reversed((cgroup, *cgroup.parents)) if each != root and each.is_relative_to(root)]
    for each in way:
        if _is_tree(each.name):
            return each
    pods = next((each for each in way if is_of_a_pod(each)), cgroup)
    return pods if pods.parent == root else pods.parent


def is_of_a_pod(cgroup: Path) -> bool:
    """Whether a cgroup has a Pod's UID in its name."""
    return bool(_POD.search(cgroup.name))


def version1_tree() -> Path | None:
    """Kubelet's tree in a hierarchy of cgroup version 1, if pods are there; else None."""
    for mount in mounts("cgroup"):
        for name in _TREES:
            if _has_pods(mount.path / name):
                return mount.path / name
    return None


def in_version1(path: Path) -> Path | None:
    """The directory with this path, relative to a root, in a hierarchy of cgroup version 1; None if there is none."""
    version1 = (mount.path / path for mount in mounts("cgroup"))
    return next((each for each in version1 if each.is_dir()), None)


def _trees(root: Path) -> Iterator[Tree]:
    """Kubelet's trees, those nearer to the root first. A tree is not searched for trees."""
    level = [root]
    for _ in range(_DEEPEST):
        below = [each for cgroup in level for each in _children(cgroup)]
        for each in below:
            if _is_tree(each.name):
                yield Tree(each, has_processes(each), _has_pods(each))
        level = [each for each in below if not _is_tree(each.name)]


def _is_tree(name: str) -> bool:
    return name in _TREES or name.endswith(_PREFIXED)


def _has_pods(tree: Path) -> bool:
    """Whether pods have cgroups in a tree: directly, or in that of their QoS class."""
    return any(is_of_a_pod(each) for below in (tree, *_children(tree)) for each in _children(below))


def _children(cgroup: Path) -> list[Path]:
    try:
        return sorted(each for each in cgroup.iterdir() if each.is_dir())
    except OSError:  # it went meanwhile
        return []
