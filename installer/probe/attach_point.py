"""Examines where the programs will be attached and pinned, and what is there already."""

import os
from pathlib import Path

from bpf import syscalls
from bpf.attachment import is_attached
from bpf.compiler import sources_digest
from bpf.errors import KernelRefused, NotAttached
from bpf.kernel import cgroup2_root, mounts, require_bpffs
from bpf.layout import TABLES, BuildEntry, Word
from bpf.layouts import layouts
from bpf.pins import LAYOUT, OtherVersion, Pins
from bpf.syscalls import Descriptor
from installer.probe.findings import Finding, Presence
from installer.scratch import scratch_pins
from installer.settings import Attachment

_ROOT_INODE = 1  # inode of the real cgroup root: kernfs gives 1 to the first directory of a hierarchy
_KUBELET = ("kubepods", "kubepods.slice")  # kubelet's cgroup with the driver cgroupfs, and with systemd


def attach_point_findings(attachment: Attachment) -> tuple[Path | None, list[Finding]]:
    """The cgroup at which the programs will be attached, None if there is none, and the findings on it."""
    try:
        root = cgroup2_root()
    except KernelRefused as error:
        return None, [Finding("cgroup2", "attaching", "not mounted", Presence.NO, str(error).partition("; ")[2])]
    mounted = Finding("cgroup2", "attaching", f"at {root}", Presence.YES)
    try:
        point = attachment.attach_point()
        os.close(os.open(point, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        found = f"{attachment.cgroup}: {error.strerror}"
        return None, [mounted, Finding("attach point", "attaching", found, Presence.NO, _GIVE)]
    if not (point / "cgroup.procs").exists() or not _is_cgroup2(point):
        return None, [
            mounted,
            Finding("attach point", "attaching", f"{point} is not a directory of cgroup2", Presence.NO, _GIVE),
        ]
    return point, [mounted, point_row(point, root, _version1_pods())]


_GIVE = "give --cgroup a directory of cgroup2, or leave it out"


def _is_cgroup2(path: Path) -> bool:
    around = [mount for mount in mounts() if path.resolve().is_relative_to(mount.path)]
    best = max(reversed(around), key=lambda mount: len(mount.path.parts))  # of mounts on the same path the last counts
    return best.filesystem == "cgroup2"


def point_row(point: Path, root: Path, version1: Path | None) -> Finding:
    """Whether pods will be below the attach point. `version1` is kubelet's cgroup of version 1, if pods are there.

    On a hybrid host whose kubelet uses cgroup version 1, all pods are in the root of cgroup2.
    """
    if point == root and _is_own_container(root):
        found = f"{point} is this container's own cgroup"
        return Finding(
            "attach point", "attaching", found, Presence.NO, "mount the host's /sys/fs/cgroup into the container"
        )
    if point == root:
        why = f"kubelet's pods are in cgroup v1 ({version1})" if version1 else "kubelet has no cgroup2 there"
        return Finding("attach point", "attaching", f"{point}, the root: {why}", Presence.YES)
    if version1 and "populated 0" in _read(point / "cgroup.events"):
        found = f"{point} is empty: pods are in {version1}, cgroup v1, so cgroup2 has them in its root"
        return Finding("attach point", "attaching", found, Presence.NO, f"--cgroup {root}")
    return Finding("attach point", "attaching", str(point), Presence.YES)


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


def _version1_pods() -> Path | None:
    """Kubelet's cgroup in a hierarchy of version 1, if pods are there; else None."""
    for mount in mounts():
        for name in _KUBELET if mount.filesystem == "cgroup" else ():
            if any(each.is_dir() for each in (mount.path / name).glob("*pod*")):
                return mount.path / name
    return None


def bpffs(attachment: Attachment) -> Finding:
    """Whether there is a bpffs on which pins can be made."""
    what, needed_by = "bpffs", "capture that outlives the agent"
    try:
        require_bpffs(attachment.bpffs)
        with scratch_pins(attachment.bpffs):
            pass
    except KernelRefused:
        advice = f"mount one and mount it into the container: mount -t bpf bpf {attachment.bpffs}"
        return Finding(what, needed_by, f"{attachment.bpffs} is not a bpffs", Presence.NO, advice)
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
    return Finding(what, needed_by, f"{pins.root}: the same programs at {build.cgroup.decode()}", Presence.YES)
