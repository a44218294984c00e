"""What this machine offers: mounts of cgroup2 and bpffs, and the process's capabilities.

The node's file systems are at this process's own root, or below node_root(). Our DaemonSet mounts the node's bpffs and
cgroups into the container. Istio's DaemonSet, in which this image runs too, mounts only the node's procfs. There, the
node's first process leads to them.
"""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bpf.errors import KernelRefused

# MS_NOSUID, MS_NODEV and MS_NOEXEC (uapi/linux/mount.h), with which systemd mounts it too
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
# the capabilities that attaching needs, by bit (uapi/linux/capability.h)
_ATTACHING = ((12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN"))


ROOT = Path("/")
# where DaemonSets mount the node's procfs, Istio's too
HOST_PROC = Path("/host/proc")


@dataclass(frozen=True)
class Mount:
    """One mount: its directory, the type of its filesystem, its id, and the directory of the filesystem that it shows.

    The directory that a mount of cgroup2 shows is told from the root of the reading thread's cgroup namespace.
    """

    path: Path
    filesystem: str
    number: int
    shows: str = "/"


@cache
def node_root() -> Path:
    """The node's root directory, as this process sees it.

    It is the process's own root, except in a container that has the node's procfs at HOST_PROC and no bpffs at all:
    there it is the root directory of the node's first process. Looking through that takes CAP_SYS_PTRACE.
    """
    through = HOST_PROC / "1/root"
    if _mounts(Path("/proc/self"), ROOT, "bpf") or not os.access(through / "proc", os.F_OK):
        return ROOT
    return through


def on_node(path: Path) -> Path:
    """A path that this process uses, as the node's own processes would write it."""
    return ROOT / path.relative_to(node_root()) if path.is_relative_to(node_root()) else path


def from_here(path: Path) -> Path:
    """The reverse of on_node(): where this process finds a path of the node."""
    return path if node_root() == ROOT else node_root() / path.relative_to(ROOT)


def require_root() -> None:
    """Raise KernelRefused unless this process runs as root."""
    if os.geteuid() != 0:
        raise KernelRefused(f"running as uid {os.geteuid()}; run as root with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN")


def require_capabilities() -> None:
    """Raise KernelRefused if this process lacks capabilities that attaching needs, as root in a container may.

    The message names them.
    """
    effective = capabilities()
    if missing := [name for bit, name in _ATTACHING if not effective >> bit & 1]:
        containers = " and ".join(name.removeprefix("CAP_") for name in missing)
        raise KernelRefused(
            f"without {' and '.join(missing)} nothing can be attached; run as root with all capabilities, "
            f"or add {containers} to the container's capabilities"
        )


def mounts(filesystem: str = "") -> list[Mount]:
    """The mounts below node_root(), all or of one type, in mount order."""
    root = node_root()
    return _mounts(Path("/proc/self") if root == ROOT else HOST_PROC / "1", root, filesystem)


def _mounts(process: Path, root: Path, filesystem: str) -> list[Mount]:
    """The mounts that a process sees (mountinfo, proc(5)). `root` is where its root directory is for us."""
    found = []
    for line in (process / "mountinfo").read_text().splitlines():
        if f" - {filesystem}" in line:  # most lines need no parsing
            fields = line.split(" ")
            kind = fields[fields.index("-") + 1]
            if filesystem in ("", kind):
                shows, path = (each.encode().decode("unicode_escape") for each in fields[3:5])
                found.append(Mount(root / path.lstrip("/"), kind, int(fields[0]), shows))
    return found


def cgroup2_root() -> Path:
    """Where the node's cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts.

    Mounts that are hidden below another mount are passed over: in a container, the host's cgroups may be mounted over
    the container's own. Raises KernelRefused.
    """
    for mount in mounts("cgroup2"):
        if _is_visible(mount):
            return mount.path
    raise KernelRefused("cgroup2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def _is_visible(mount: Mount) -> bool:
    """Whether the mount's path leads to this mount, not to one that was mounted over it (fdinfo's mnt_id, proc(5))."""
    try:
        opened = os.open(mount.path, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        lines = Path(f"/proc/self/fdinfo/{opened}").read_text().splitlines()
    finally:
        os.close(opened)
    return f"mnt_id:\t{mount.number}" in lines


def own_cgroup(root: Path) -> Path | None:
    """The cgroup2 directory that this process is in, below `root`; None if it is not visible there.

    In a container, the path in /proc/self/cgroup may be that within a cgroup namespace. So this path is tried first,
    then every directory below `root` is searched.
    """
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    if _holds_us(hinted := root / path.lstrip("/")):
        return hinted
    return next((Path(each) for each, _, _ in os.walk(root) if _holds_us(Path(each))), None)


def _holds_us(cgroup: Path) -> bool:
    try:
        return str(os.getpid()) in (cgroup / "cgroup.procs").read_text().split()
    except OSError:
        return False


def capabilities() -> int:
    """Effective capabilities of this process; bit n is capability n of uapi/linux/capability.h."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))


def possible_cpus() -> int:
    """The number of values in an entry of a per-CPU map.

    It is the highest CPU in /sys/devices/system/cpu/possible (ranges such as "0-3,8") plus 1.
    """
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition(",")[2]
    return int(last.rpartition("-")[2]) + 1


def has_mount(path: Path, filesystem: str) -> bool:
    """Whether `path` itself is the mount point of a filesystem of this type."""
    if node_root() != ROOT and path.is_relative_to(node_root()):
        found, real = mounts(filesystem), path  # realpath() would take the link to the node's root for our own
    else:
        found, real = _mounts(Path("/proc/self"), ROOT, filesystem), Path(os.path.realpath(path))
    return any(mount.path == real for mount in found)


def mount_bpffs(path: Path) -> None:
    """Mount a bpffs at `path`, an existing directory. Raises KernelRefused."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", _NOSUID_NODEV_NOEXEC, b"mode=0700") != 0:
        number = ctypes.get_errno()
        raise KernelRefused(f"mount({path}, bpf): {os.strerror(number)}; mount one: mount -t bpf bpf {path}", number)
