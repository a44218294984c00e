"""What this machine offers: mounts of cgroup2 and bpffs, and the process's capabilities."""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from bpf.errors import KernelRefused

# MS_NOSUID, MS_NODEV and MS_NOEXEC (uapi/linux/mount.h), with which systemd mounts it too
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
# the capabilities that attaching needs, by bit (uapi/linux/capability.h)
_ATTACHING = ((12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN"))


@dataclass(frozen=True)
class Mount:
    """One mount: its directory, the type of its filesystem, and its id."""

    path: Path
    filesystem: str
    number: int


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
    """The mounts of this process's namespace, all or of one type (/proc/self/mountinfo, proc(5)), in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if f" - {filesystem}" in line:  # most lines need no parsing
            fields = line.split(" ")
            kind = fields[fields.index("-") + 1]
            if filesystem in ("", kind):
                found.append(Mount(Path(fields[4].encode().decode("unicode_escape")), kind, int(fields[0])))
    return found


def cgroup2_root() -> Path:
    """Where cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts. Raises KernelRefused.

    Mounts that are hidden below another mount are passed over: in a container, the host's cgroups may be mounted over
    the container's own.
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
    real = Path(os.path.realpath(path))
    return any(mount.path == real and mount.filesystem == filesystem for mount in mounts())


def mount_bpffs(path: Path) -> None:
    """Mount a bpffs at `path`, an existing directory. Raises KernelRefused."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", _NOSUID_NODEV_NOEXEC, b"mode=0700") != 0:
        number = ctypes.get_errno()
        raise KernelRefused(f"mount({path}, bpf): {os.strerror(number)}; mount one: mount -t bpf bpf {path}", number)


def require_bpffs(path: Path) -> None:
    """Raise KernelRefused unless `path` is a mounted bpffs: pins can be nowhere else."""
    if not path.exists():
        how = f"mkdir -p {path} && mount -t bpf bpf {path}"
        raise KernelRefused(f"{path} does not exist; make a bpffs: {how}")
    if not has_mount(path, "bpf"):
        raise KernelRefused(f"{path} is not a bpffs; mount one: mount -t bpf bpf {path}")
