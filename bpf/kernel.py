"""What this machine offers: where cgroup2 and bpffs are mounted, and where the programs should be attached."""

import os
from dataclasses import dataclass
from pathlib import Path

from bpf.errors import KernelRefused

# kubelet's cgroup, by driver: cgroupfs, systemd; a cgroupRoot puts it one level down
_KUBEPODS = ("kubepods", "kubepods.slice", "*/kubepods", "*/kubepods.slice")
# uapi/linux/capability.h
_ATTACHING = ((12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN"))


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    path: Path
    filesystem: str


def require_root() -> None:
    """Raise KernelRefused unless this process may load and attach programs."""
    if os.geteuid() != 0:
        raise KernelRefused(f"running as uid {os.geteuid()}; run as root with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN")


def require_capabilities() -> None:
    """Raise KernelRefused, naming them, if this process lacks capabilities that attaching takes, as in a container."""
    effective = capabilities()
    if missing := [name for bit, name in _ATTACHING if not effective >> bit & 1]:
        containers = " and ".join(name.removeprefix("CAP_") for name in missing)
        raise KernelRefused(
            f"without {' and '.join(missing)} nothing can be attached; run as root with all capabilities, "
            f"or add {containers} to the container's"
        )


def mounts() -> list[Mount]:
    """Every mount of this process's namespace (/proc/self/mountinfo, proc(5)), in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        kind = fields[fields.index("-") + 1]
        found.append(Mount(Path(fields[4].encode().decode("unicode_escape")), kind))
    return found


def cgroup2_root() -> Path:
    """Where cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts. Raises KernelRefused."""
    for mount in mounts():
        if mount.filesystem == "cgroup2":
            return mount.path
    raise KernelRefused("cgroup2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def attach_point() -> Path:
    """The cgroup to attach at: kubelet's when cgroup2 has one, else the root.

    Programs of a child cgroup run before the root's, so below kubepods we see a Service address before a socket
    load-balancer attached at the root rewrites it, and host daemons pay nothing.
    """
    root = cgroup2_root()
    for pattern in _KUBEPODS:
        for found in sorted(root.glob(pattern)):
            if found.is_dir():
                return found
    return root


def own_cgroup(root: Path) -> Path | None:
    """The cgroup2 directory this process is in, as seen below `root`; None when it is not to be seen there.

    In a container /proc/self/cgroup may tell the path within a cgroup namespace, so it is only a hint.
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
    """Effective capabilities of this process: bit n is capability n of uapi/linux/capability.h."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))


def possible_cpus() -> int:
    """How many values an entry of a per-CPU map has (/sys/devices/system/cpu/possible: ranges as in "0-3,8")."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition(",")[2]
    return int(last.rpartition("-")[2]) + 1


def has_mount(path: Path, filesystem: str) -> bool:
    """Whether a filesystem of that kind is mounted just there."""
    real = Path(os.path.realpath(path))
    return any(mount.path == real and mount.filesystem == filesystem for mount in mounts())


def require_bpffs(path: Path) -> None:
    """Raise KernelRefused unless `path` is a mounted bpffs, the only place pins can be."""
    if not path.exists():
        how = f"mkdir -p {path} && mount -t bpf bpf {path}"
        raise KernelRefused(f"{path} is no bpffs, it does not exist; make one: {how}")
    if not has_mount(path, "bpf"):
        raise KernelRefused(f"{path} is no bpffs; mount one: mount -t bpf bpf {path}")
