"""A host of the cluster: namespaces and cgroups of its own on this machine, and the daemons in them.

Everything of a host can be found from the cluster's id and the host's name: its network namespace, its cgroups in every
hierarchy, its directory. So whoever finds it can take it down.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.cluster import boot, shape
from tests.cluster.addresses import Place
from tests.lab.inside import PYTHON
from tests.lab.node import NETNS, identity_of, make_netns
from tests.lab.waiting import wait_until

CGROUPS = Path("/sys/fs/cgroup")
# What a host keeps over a reboot; also what is too big for memory.
_FOLDERS = (
    "/etc/cni/net.d",
    "/opt/cni/bin",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
)
# $1 is how many cgroups follow; the rest is the command
_IN_CGROUPS = 'n=$1; shift; while [ $n -gt 0 ]; do echo $$ > "$1/cgroup.procs"; shift; n=$((n-1)); done; exec "$@"'
_SECONDS = 30


def lacking() -> str:
    """What hosts can't be made without and is not there; empty if nothing is."""
    if os.geteuid() != 0:
        return "namespaces and cgroups need root"
    if not (CGROUPS / "unified").exists():
        return f"{CGROUPS} has no `unified`; hosts are made of a hybrid machine's cgroups"
    return ""


class Host:
    """`directory` has its state, which outlives a reboot, its daemons' files and their logs."""

    def __init__(self, cluster: str, name: str, place: Place, directory: Path) -> None:
        """`cluster` is the id of the cluster, `directory` is made."""
        self.name, self.place, self.directory = name, place, directory
        self.netns = NETNS / f"sidestep-cluster-{cluster}-{name}"
        self._cgroup = f"sidestep-cluster-{cluster}-{name}"
        self._unshare: subprocess.Popen[str] | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pid(self) -> int:
        """The first process of the host, as the machine numbers it."""
        return int(self._identity().split()[0])

    def boot(self) -> None:
        """Make the namespaces and what is in them; no daemon runs yet."""
        self._state.mkdir(parents=True, exist_ok=True)
        make_netns(self.netns)
        tops = _make_cgroups(self._cgroup)
        first = [*PYTHON[:-1], boot.__file__, shape.cgroups(), shape.driver(), str(self._state), *_FOLDERS]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child", *first]
        argv = [*_moving_to(tops), "nsenter", f"--net={self.netns}", *unshare]
        with (self.directory / "boot.log").open("a") as log:
            self._unshare = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "up\n":
            raise DaemonEnded(f"{self.name} does not boot:\n{(self.directory / 'boot.log').read_text()}")
        (self.directory / "first").write_text(identity_of(_only_child(self._unshare.pid)))
        # a cgroup with a process of its own hands no controller down, and kubelet asks for each that the top has
        for top in tops:
            (top / "system" / "cgroup.procs").write_text(str(self._unshare.pid))
        if shape.driver() == shape.SYSTEMD:
            wait_until(self._has_systemd, f"the systemd of {self.name}", _SECONDS)
        self.run(["hostname", self.name])

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs `argv` on this host."""
        namespaces = [f"--{each}" for each in ("mount", "pid", "uts", "ipc", "cgroup", "net")]
        enter = ["nsenter", f"--target={self.pid}", *namespaces]
        # what programs remember of a cluster goes with it
        home = ["env", f"HOME={self.directory}"]
        return [*_moving_to(top / "system" for top in _tops(self._cgroup)), *enter, *home, *map(str, argv)]

    def run(self, argv: Sequence[str | Path], text: str = "") -> str:
        """Run to its end with `text` as its input; what it prints. Raises CommandFailed with what it said."""
        done = subprocess.run(self.command(argv), input=text, capture_output=True, text=True)
        if done.returncode:
            raise CommandFailed(f"{self.name}: {' '.join(map(str, argv))}: {done.stderr.strip() or done.stdout}")
        return done.stdout

    def start(self, daemon: str, argv: Sequence[str | Path]) -> None:
        """Run it in the background, with its log in the host's directory."""
        with self.log(daemon).open("ab") as log:
            self._daemons[daemon] = subprocess.Popen(
                self.command(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, daemon: str) -> None:
        """With SIGKILL, which leaves it no time for anything. It is gone afterwards; what it has started is not."""
        process = self._daemons[daemon]
        os.kill(_only_child(process.pid), signal.SIGKILL)  # the process itself is nsenter, which follows
        process.wait(_SECONDS)

    def folder(self, path: str) -> Path:
        """Where the machine has one of the folders that this host keeps over a reboot."""
        return self._state / boot.name_of(path)

    def log(self, daemon: str) -> Path:
        """What it has said."""
        return self.directory / f"{daemon}.log"

    def check(self, daemon: str) -> None:
        """Raises DaemonEnded with the end of its log if it has ended."""
        if self._daemons[daemon].poll() is not None:
            raise DaemonEnded(f"{self.name}: {daemon} has ended:\n{self.log(daemon).read_text()[-3000:]}")

    def power_off(self) -> None:
        """All of its processes are gone afterwards, with their mounts; cgroups and the network are too."""
        with suppress(ProcessLookupError):  # powered off before
            if not (self.directory / "first").exists():  # whoever booted it has ended before it was up
                _kill_all_in(self._cgroup)
            elif identity_of(self.pid) == self._identity():  # else the number is somebody else's by now
                os.kill(self.pid, signal.SIGKILL)
        for process in (self._unshare, *self._daemons.values()):
            if process:
                process.wait(_SECONDS)
        for top in _tops(self._cgroup):
            wait_until(partial(_gone, top), f"the processes in {top} to end", _SECONDS)
        if self.netns.exists():
            subprocess.run(["ip", "netns", "del", self.netns.name], check=True)

    def _has_systemd(self) -> bool:
        try:
            return bool(self.run(["systemctl", "is-active", boot.SYSTEMD_TARGET]))
        except CommandFailed:
            return False

    @property
    def _state(self) -> Path:
        return self.directory / "state"

    def _identity(self) -> str:
        return (self.directory / "first").read_text()


class DaemonEnded(Exception):
    """Where, which, and the end of its log."""


class CommandFailed(Exception):
    """Where, what, and what it said."""


def _moving_to(cgroups: Any) -> list[str]:
    paths = [str(each) for each in cgroups]
    return ["sh", "-c", _IN_CGROUPS, "sh", str(len(paths)), *paths]


def _tops(name: str) -> list[Path]:
    """The host's cgroup in each hierarchy of the machine, where it is there."""
    return [path for path in sorted(CGROUPS.glob(f"*/{name}")) if (path / "cgroup.procs").exists()]


def _make_cgroups(name: str) -> list[Path]:
    """One in each hierarchy, with `system` for daemons."""
    for hierarchy in sorted(path.parent for path in CGROUPS.glob("*/cgroup.procs")):
        for cgroup in (hierarchy / name, hierarchy / name / "system"):
            cgroup.mkdir()
            for setting in ("cpuset.cpus", "cpuset.mems"):  # of cgroup v1, where an empty one takes no process
                if (cgroup / setting).exists():
                    (cgroup / setting).write_text((cgroup.parent / setting).read_text())
    return _tops(name)


def _kill_all_in(name: str) -> None:
    """Whatever is in the host's cgroups, which have nobody else's processes."""
    for listed in (each for top in _tops(name) for each in top.glob("**/cgroup.procs")):
        for pid in listed.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _gone(top: Path) -> bool:
    """Remove it and what is below it; False while a process is still in one of them."""
    try:
        for each in sorted(top.glob("**/"), reverse=True):
            each.rmdir()
    except OSError:
        return False
    return True


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
