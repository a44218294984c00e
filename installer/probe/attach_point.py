"""Examines where the programs will be attached and pinned, and what is there already."""

import os
from collections.abc import Sequence
from pathlib import Path

from bpf import syscalls, trees
from bpf.attachment import is_attached, places_of
from bpf.bpffs import require_bpffs
from bpf.compiler import sources_digest
from bpf.errors import KernelRefused, NotAttached
from bpf.kernel import cgroup2_root
from bpf.layout import TABLES, BuildEntry, Word
from bpf.layouts import layouts
from bpf.pins import LAYOUT, OtherVersion, Pins
from bpf.syscalls import Descriptor
from bpf.trees import Choice, Tree
from installer.probe.findings import Finding, Presence
from installer.scratch import scratch_pins
from installer.settings import Attachment

_ROOT_INODE = 1  # inode of the real cgroup root: kernfs gives 1 to the first directory of a hierarchy
_WHAT, _NEEDED_BY = "attach point", "attaching"
_GIVE = "give --cgroup a directory of cgroup2, or leave it out"


def attach_point_findings(attachment: Attachment) -> tuple[list[Path], list[Finding]]:
    """The cgroups at which the programs will be attached, none if they can't be, and the findings on them."""
    try:
        root = cgroup2_root()
    except KernelRefused as error:
        return [], [Finding("cgroup2", _NEEDED_BY, "not mounted", Presence.NO, str(error).partition("; ")[2])]
    mounted = Finding("cgroup2", _NEEDED_BY, f"at {root}", Presence.YES)
    choice = attachment.choice()
    try:
        os.close(os.open(choice.first, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        return [], [mounted, Finding(_WHAT, _NEEDED_BY, f"{choice.first}: {error.strerror}", Presence.NO, _GIVE)]
    if not (choice.first / "cgroup.procs").exists() or choice.first.stat().st_dev != root.stat().st_dev:
        found = f"{choice.first} is not a directory of cgroup2"
        return [], [mounted, Finding(_WHAT, _NEEDED_BY, found, Presence.NO, _GIVE)]
    return list(choice.every), [mounted, point_row(choice, root, trees.kubelets_trees(), trees.version1_tree())]


def point_row(choice: Choice, root: Path, found: Sequence[Tree], version1: Path | None) -> Finding:
    """Which cgroups were chosen, why, and whether pods are there.

    `found` are kubelet's trees. `version1` is kubelet's cgroup of version 1, if pods are there: on a hybrid host whose
    kubelet uses cgroup version 1, pods may be in the root of cgroup2.
    """
    if choice.first == root and _is_own_container(root):
        told, advice = f"{root} is this container's own cgroup", "mount the host's /sys/fs/cgroup into the container"
        return Finding(_WHAT, _NEEDED_BY, told, Presence.NO, advice)
    is_empty = not any(map(trees.is_inhabited, choice.every))
    if is_empty and version1:
        told = f"{choice.first} is empty: pods are in {version1}, cgroup v1, so cgroup2 has them in its root"
        return Finding(_WHAT, _NEEDED_BY, told, Presence.NO, f"--cgroup {root}")
    left = [tree for tree in found if not any(map(tree.path.is_relative_to, choice.every))]
    elsewhere = [str(tree.path) for tree in left if tree.is_inhabited]
    empty = [str(tree.path) for tree in left if not tree.is_inhabited]
    told = f"{' and '.join(map(str, choice.every))}, {choice.why}"
    told += "; no process and no pod's cgroup is there" * is_empty
    told += f"; pods are in {' and '.join(elsewhere)} too, where nothing will be attached" if elsewhere else ""
    told += f"; left alone, as nothing is there: {' and '.join(empty)}" if empty else ""
    if elsewhere:
        return Finding(_WHAT, _NEEDED_BY, told, Presence.WARNING, "leave --cgroup out, or give a cgroup above all pods")
    if is_empty:
        return Finding(_WHAT, _NEEDED_BY, told, Presence.WARNING, "look again when pods run")
    return Finding(_WHAT, _NEEDED_BY, told, Presence.YES)


def _is_own_container(root: Path) -> bool:
    """Whether the apparent root of cgroup2 is only the root of this container's cgroup namespace.

    In that case it is not the real root, this process is in it, and it has no cgroups below it.
    """
    if root.stat().st_ino == _ROOT_INODE or str(os.getpid()) not in _read(root / "cgroup.procs").split():
        return False
    return not any(each.is_dir() for each in root.iterdir())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def bpffs(attachment: Attachment) -> Finding:
    """Whether there is a bpffs on which pins can be made."""
    what, needed_by = "bpffs", "capture that outlives the agent"
    try:
        require_bpffs(attachment.bpffs)
        with scratch_pins(attachment.bpffs):
            pass
    except KernelRefused as refused:
        found, _, advice = str(refused).partition("; ")
        return Finding(what, needed_by, found, Presence.NO, f"{advice}; in a container, mount the node's into it")
    except OSError as error:
        return Finding(what, needed_by, f"{attachment.bpffs}: {error.strerror}", Presence.NO, "mount it writable")
    return Finding(what, needed_by, f"at {attachment.bpffs}", Presence.YES)


def earlier_installation(attachment: Attachment) -> list[Finding]:
    """What an earlier agent, or an earlier version, has left attached."""
    pins = attachment.pins
    try:
        found = sorted(path.name for path in layouts(pins))
    except OSError:
        return []  # nothing there; the row "bpffs" says whether there is a bpffs
    rows = [_current(pins)] if LAYOUT in found else []
    for other in found:
        if other != LAYOUT:
            advice = "an agent of this version takes its pods over, or clears away what is left of it"
            rows.append(
                Finding(
                    "earlier installation",
                    "upgrades",
                    f"{pins.top / other}: layout {other}, this is {LAYOUT}",
                    Presence.WARNING,
                    advice,
                )
            )
    return rows


def _current(pins: Pins) -> Finding:
    what, needed_by = "earlier installation", "upgrades"
    build = BuildEntry()
    try:
        for name in TABLES:
            os.close(pins.open_map(name))
        with Descriptor(pins.open_map("build")) as table:
            syscalls.map_lookup(table.fd, Word(0), build)
    except (OtherVersion, KernelRefused) as error:
        advice = "run `sidestep detach`, then start again"
        return Finding(what, needed_by, str(error).partition("; ")[0], Presence.NO, advice)
    except NotAttached as error:  # attaching finds the map through the programs, or makes it
        return Finding(what, needed_by, f"{str(error).partition('; ')[0]}; it will be put back", Presence.YES)
    if bytes(build.sources) != sources_digest():
        return Finding(what, needed_by, f"{pins.root}: other programs", Presence.YES, "they will be swapped in place")
    if not is_attached(pins):
        return Finding(what, needed_by, f"{pins.root}: links are missing", Presence.YES, "they will be made anew")
    at = " and ".join(map(str, places_of(pins)))
    return Finding(what, needed_by, f"{pins.root}: the same programs at {at}", Presence.YES)
