"""The first process of a host: gives it file systems of its own, and then reaps orphans until it is killed.

Runs as `boot.py CGROUPS DRIVER STATE FOLDER…` in fresh namespaces, with the standard library alone. CGROUPS is
`hybrid`, the machine's hierarchies side by side, or `pure`, cgroup2 alone. With the DRIVER `systemd` the machine's
systemd then takes over, with no unit but a target. The FOLDERs are the host's own and stay in STATE; what is written
elsewhere below /etc, /opt, /run and /var is gone with the host. Says "up" when all is there. Whoever kills this process
ends everything in its namespaces.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SYSTEMD_TARGET = "host.target"
_SYSTEMD = "/lib/systemd/systemd"
# kubelet sets these for the whole machine if they differ (pkg/kubelet/cm, setupKernelTunables)
_TUNABLES = {
    "vm/overcommit_memory": 1,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}
# What is mounted there describes the machine, or holds what others have made on it: a copy would keep that alive.
_MACHINES = (Path("/run"), Path("/sys"), Path("/proc"))


def main(cgroups: str, driver: str, state: Path, folders: list[str]) -> None:
    hierarchies = [] if cgroups == "pure" else _hierarchies()
    _forget_machine()
    # nothing goes back to the machine; inside, a container may be given what is mounted later (HostToContainer)
    _mount("--make-rshared", "/")
    _mount("-t", "proc", "proc", "/proc")
    keep = _fresh_run(state)
    for top in ("etc", "opt", "var"):
        _overlay(Path("/", top), Path("/run/host", top))
    for name in folders:
        _bind(keep / name_of(name), Path(name))
    _fresh_sys(hierarchies)
    _protect_sysctls()
    _satisfy_kubelet()
    if driver == "systemd":
        _become_systemd()
    for hierarchy in [CGROUPS / name for name, *_ in hierarchies] or [CGROUPS]:
        (hierarchy / "system" / "cgroup.procs").write_text("0")
    print("up", flush=True)
    _reap()


def name_of(folder: str) -> str:
    """What a host's folder is called in the state."""
    return folder.strip("/").replace("/", "-")


def _hierarchies() -> list[tuple[str, str, str]]:
    """The machine's cgroup mounts: name, type, and the options that name the controllers."""
    found = []
    for path, kind, options in _mounts():
        if kind in ("cgroup", "cgroup2") and path.parent == CGROUPS:
            asked = [each for each in options.split(",") if each not in ("rw", "ro")]
            named = any(each.startswith("name=") for each in asked)
            found.append((path.name, kind, ",".join((["none"] if named else []) + asked) or "rw"))
    return found


def _mounts() -> list[tuple[Path, str, str]]:
    """Place, type, and options of the file system (proc(5), mountinfo)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        kind, _, options = after.split()[:3]
        found.append((Path(before.split()[4]), kind, options))
    return found


def _forget_machine() -> None:
    for path, kind, _ in reversed(_mounts()):
        if kind in ("bpf", "nsfs") or any(path.is_relative_to(top) for top in _MACHINES):
            ended = subprocess.run(["umount", "--lazy", path]).returncode
            # what somebody else has removed meanwhile, a lab's network namespace say, the kernel has unmounted here too
            if ended and any(path == each for each, _, _ in _mounts()):
                raise OSError(f"{path} stays mounted")


def _fresh_run(state: Path) -> Path:
    """An empty /run, as after a reboot. Returns where in it the state is, whatever is mounted over its place."""
    before = os.open(state, os.O_PATH)
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for folder in ("lock", "netns", "host", "host/state"):
        Path("/run", folder).mkdir()
    _mount("--bind", f"/proc/{os.getpid()}/fd/{before}", "/run/host/state")
    os.close(before)
    return Path("/run/host/state")


def _overlay(path: Path, changes: Path) -> None:
    """The machine's folder, with changes over it that the machine does not see."""
    for folder in (changes, work := changes.with_name(f"{changes.name}.work")):
        folder.mkdir()
    _mount("-t", "overlay", "-o", f"lowerdir={path},upperdir={changes},workdir={work}", "overlay", path)


def _bind(source: Path, target: Path) -> None:
    for folder in (source, target):
        folder.mkdir(parents=True, exist_ok=True)
    _mount("--bind", source, target)


def _fresh_sys(hierarchies: list[tuple[str, str, str]]) -> None:
    """The network of this namespace, a bpffs, and cgroups whose top is this host's."""
    _mount("-t", "sysfs", "sysfs", "/sys")
    _mount("-t", "bpf", "bpf", "/sys/fs/bpf")
    if not hierarchies:
        _mount("-t", "cgroup2", "cgroup2", CGROUPS)
        return
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", CGROUPS)
    for name, kind, options in hierarchies:
        (CGROUPS / name).mkdir()
        _mount("-t", kind, "-o", options, kind, CGROUPS / name)


def _satisfy_kubelet() -> None:
    """Files of ours in place of the machine's sysctls, which stay as they are."""
    for name, value in _TUNABLES.items():
        file = Path("/run/host", name.replace("/", "."))
        file.write_text(f"{value}\n")
        _mount("--bind", file, Path("/proc/sys", name))
    # the kernel lets user namespaces mount a procfs if one without anything over it is in sight
    Path("/run/host/proc").mkdir()
    _mount("-t", "proc", "proc", "/run/host/proc")


def _protect_sysctls() -> None:
    """A systemd and network plugins set some of the whole machine's; those of the network are this host's own."""
    for path, option in (("/proc/sys", "ro"), ("/proc/sys/net", "rw")):
        _mount("--bind", path, path)
        _mount("--make-private", path)  # else what is mounted over one appears over the other too
        _mount("-o", f"remount,bind,{option}", path)


def _become_systemd() -> None:
    """It takes the cgroup that it starts in for its own, the host's top, and makes slices and scopes there."""
    units = Path("/run/systemd/system")
    units.mkdir(parents=True)
    (units / SYSTEMD_TARGET).write_text("[Unit]\nDefaultDependencies=no\n")
    for device in ("/dev/console", "/dev/kmsg"):  # the machine's
        _mount("--bind", "/dev/null", device)
    # `container` tells it that hardware is none of its business
    environment = {"container": "sidestep", "PATH": os.environ["PATH"]}
    argv = [_SYSTEMD, "--system", f"--unit={SYSTEMD_TARGET}", "--show-status=no"]
    print("up", flush=True)
    os.execve(_SYSTEMD, argv, environment)


def _mount(*argv: object) -> None:
    subprocess.run(["mount", *map(str, argv)], check=True)


def _reap() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(1)  # nobody to wait for


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
