"""The agent in a container as Istio's DaemonSet makes it, on a host with processes, mounts and cgroups of its own.

The container has the node's procfs, its CNI directories and its run directory, and no more: no bpffs, no cgroups of the
node, none of its process ids, and five capabilities (manifests/charts/istio-cni of Istio).
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.addresses import Place
from tests.cluster.host import CGROUPS, Host
from tests.lab.inside import PYTHON
from tests.lab.node import REPOSITORY
from tests.lab.waiting import wait_until

RIGHTS = ("net_admin", "net_raw", "sys_ptrace", "sys_admin", "dac_override")
_POD = "kubepods/burstable/pod1c0de1f0-5b1e-4c39-9d2b-0f6a3f5d7c11/agent"
_SECONDS = 30
_CGROUP2 = "/sys/fs/cgroup/unified"
# of the container's root: what is the machine's, with changes that go with the container
_FILES = """
set -e
box=/run/box; mkdir -p $box/changes $box/work $box/root /run/istio-cni
mount -t overlay -o lowerdir=/,upperdir=$box/changes,workdir=$box/work overlay $box/root
cd $box/root; mkdir -p host/proc host/opt/cni/bin host/etc/cni/net.d
mount -t tmpfs tmpfs run; mkdir run/istio-cni; mount -t tmpfs tmpfs tmp
mount --bind /run/istio-cni run/istio-cni
mount --bind /opt/cni/bin host/opt/cni/bin; mount --bind /etc/cni/net.d host/etc/cni/net.d
mount --rbind /proc host/proc; mount -o remount,bind,ro host/proc
mount -t proc proc proc; mount -t sysfs -o ro sysfs sys; mount --rbind /dev dev
mount -t tmpfs tmpfs sys/fs/cgroup; mkdir sys/fs/cgroup/unified; mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
mount --bind "$REPOSITORY" "./$REPOSITORY"; mount --rbind "$VENV" "./$VENV"
"""


class IstiosContainer:
    """One on a host; its first process is `install-cni`."""

    def __init__(self, host: Host, pods: Path) -> None:
        """`pods` is a directory with manifests, which the agent takes for those of its node."""
        self.host, self._pods = host, pods

    def start(self, *argv: str) -> None:
        """`install-cni` with these arguments."""
        venv = Path(os.path.realpath(REPOSITORY / ".venv"))
        files = f"REPOSITORY={REPOSITORY}; VENV={venv}; {_FILES}"
        enter = f"exec unshare --cgroup chroot . {' '.join(self._as_container(['install-cni', *argv]))}"
        namespaces = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", f"{files}\n{enter}"]
        here = f'mkdir -p {_CGROUP2}/{_POD}; echo $$ > {_CGROUP2}/{_POD}/cgroup.procs; exec "$@"'
        self.host.start("install-cni", ["sh", "-c", here, "sh", *namespaces])

    def sidestep(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """What `kubectl exec … -- sidestep …` does."""
        namespaces = [f"--{each}" for each in ("mount", "pid", "cgroup", "net", "root")]
        enter = ["nsenter", f"--target={self._pid()}", *namespaces, *self._as_container(argv)]
        return subprocess.run(enter, capture_output=True, text=True, timeout=60)

    def log(self) -> str:
        """What the agent has said."""
        return self.host.log("install-cni").read_text()

    def _as_container(self, argv: "tuple[str, ...] | list[str]") -> list[str]:
        rights = ",".join(f"+{each}" for each in RIGHTS)
        drop = ["setpriv", f"--bounding-set=-all,{rights}", f"--inh-caps=-all,{rights}", "--ambient-caps=-all"]
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": REPOSITORY,
            "REPAIR_RUN_AS_DAEMON": "true",
            "POD_NAMESPACE": "istio-system",
            "SIDESTEP_SHIM": REPOSITORY / "build" / "sidestep-cni",
            "SIDESTEP_PODS": self._pods,
        }
        given = [f"{name}={value}" for name, value in environment.items()]
        return [*drop, "env", "-i", *given, str(REPOSITORY / ".venv/bin/python"), "-P", "-m", "installer", *argv]

    def _pid(self) -> int:
        """Of the agent, as the machine numbers it."""
        (procs,) = CGROUPS.glob(f"unified/{self.host.netns.name}/{_POD}/cgroup.procs")
        for pid in procs.read_text().split():
            words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if words[-1:] == [b""] and b"install-cni" in words and b"-m" in words[1:4]:
                return int(pid)
        raise LookupError(self.log())


@contextmanager
def istios_container(directory: Path, pods: Path) -> Iterator[IstiosContainer]:
    """On a host that is gone afterwards; `directory` must not be there."""
    host = Host(directory.name, "node", Place(1), directory)
    host.boot()
    try:
        host.run(["ip", "link", "set", "lo", "up"])
        yield IstiosContainer(host, pods)
    finally:
        host.power_off()


def started_pod(host: Host, name: str, address: str) -> str:
    """A pod's namespace that has this address, and a process in it; returns the path of the namespace."""
    netns = f"/run/netns/{name}"
    cgroup = f"{_CGROUP2}/kubepods/besteffort/pod-{name}"
    inside = f"ip link set lo up; ip link add eth0 type bridge; ip addr add {address}/24 dev eth0; ip link set eth0 up"
    idle = " ".join([*PYTHON, "'import time; time.sleep(600)'"])
    move = f"mkdir -p {cgroup}; echo $$ > {cgroup}/cgroup.procs; ip netns add {name}"
    host.start(name, ["sh", "-c", f'{move}; exec nsenter --net={netns} sh -c "{inside}; exec {idle}"'])
    has_address = f"ip -n {name} -o addr 2> /dev/null | grep -F ' {address}/' || true"
    wait_until(
        lambda: bool(host.run(["sh", "-c", has_address])), f"the pod {name}: {host.log(name).read_text()}", _SECONDS
    )
    return netns
