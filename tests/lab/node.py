"""A node of its own on this machine: a namespace for the bridge, a cgroup, a bpffs, an agent, and pods.

Everything a node has can be found from its id: namespaces sidestep-<id>-*, the cgroup sidestep-lab-<id> with every
process in it, the directory /run/sidestep-lab/<id> with its bpffs. So a node can be taken down by whoever finds it.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from bpf.errors import SidestepError
from bpf.kernel import cgroup2_root, mounts
from bpf.links import linked_pods
from bpf.pins import Pins
from bpf.tables import Tables
from tests.lab.apiserver import ApiServer
from tests.lab.cgroups import remove_cgroup
from tests.lab.chain import Chain
from tests.lab.inside import popen
from tests.lab.leftovers import outside
from tests.lab.machine import naming_labs
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
LABS = Path("/run/sidestep-lab")
NETNS = Path("/run/netns")
PLUGINS = Path("/usr/lib/cni")
_SELFTEST = REPOSITORY / "build" / "selftest.json"
# Subnets of /24 that a lab may have, below 10.128.0.0/10 for pods on its bridge and below 10.192.0.0/10 for others.
# Addresses that tests choose themselves are not among them.
_SUBNETS = 64 << 8
_BRIDGED, _UNBRIDGED = 128, 192
_SLOWEST_SECONDS = 60  # an agent's start or end on a machine on which much else is going on
KEPT = f"kept {REPOSITORY}"  # the owner of a lab that is to stay, by the checkout that has made it
NODE_NAME = "lab"  # as the API server knows it


class Agent:
    """`sidestep agent` of one node."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.log = node.directory / "agent.log"
        self._logged = 0  # bytes of the log that are of agents before
        self.options: list[str | Path] = []
        self.cgroup: Path | None = None  # by the name it has in the agent's view of the machine
        self.chooses = False  # whether it is not told where to attach
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running agent's process id."""
        assert self.process is not None
        return self.process.pid

    def port(self, purpose: str) -> int:
        """Where the running agent serves `purpose`, health or metrics: on a free port, which its log names."""
        found = re.findall(rf"event=agent.serving.* {purpose}=(\d+)", self.log.read_text())
        return int(found[-1])

    def start(self, source: Path = REPOSITORY) -> None:
        """Run the agent of a source tree and wait until its socket answers."""
        node = self._node
        argv: list[str | Path] = [sys.executable, "-m", "installer", "agent"]
        if node.agent_source:
            argv += node.agent_source
        elif node.api:
            kubeconfig = node.api.kubeconfig(node.directory / "kubeconfig")
            argv += ["--kubeconfig", kubeconfig, "--kubernetes-node-name", NODE_NAME]
        else:
            argv += ["--pods", node.pods_dir]
        argv += ["--bpffs", node.bpffs, "--cni-agent-run-dir", node.run_dir]
        argv += [] if self.chooses else ["--cgroup", self.cgroup or node.kubepods]
        argv += ["--health-port", "0", "--monitoring-port", "0", *self.options]
        self._logged = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*node.agent_wrapper, *argv],
                cwd=source,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"},  # see _end()
            )
        (node.cgroup / "agent" / "cgroup.procs").write_text(str(self.process.pid))
        wait_until(self._answers, f"the agent to serve; see {self.log}", _SLOWEST_SECONDS)

    def kill(self) -> None:
        """SIGKILL: as a crash."""
        self._end("kill")

    def terminate(self) -> None:
        """SIGTERM: as an upgrade."""
        self._end("terminate")

    def _end(self, how: str) -> None:
        if self.process:
            getattr(self.process, how)()
            try:
                self.process.wait(_SLOWEST_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGABRT)  # upon which it says what every thread was doing
                self.process.wait()
                raise RuntimeError(f"the agent does not end:\n{self.log.read_text()[-20000:]}") from None
            finally:
                self.process = None

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the agent has ended:\n{self.log.read_text()[-20000:]}")
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(self._node.run_dir / "cni.sock"))
            peer = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            return bool(peer == self.pid) and b"event=agent.serving" in self.log.read_bytes()[self._logged :]
        return False


class Node:
    """Use as a context manager; leaving it takes everything down."""

    def __init__(self, keep: bool = False, api: ApiServer | None = None) -> None:
        """Its id is taken at once. `api` is where Pods come from instead of a directory."""
        self.id = _new_id()
        self.api = api
        self.is_chained = True  # whether the plugin is in the CNI chain
        self.directory = LABS / self.id
        self.bpffs = self.directory / "bpffs"
        self.run_dir = self.directory / "run"
        self.pods_dir = self.directory / "pods"
        self.cgroup = cgroup2_root() / f"sidestep-lab-{self.id}"
        self.kubepods = self.cgroup / "kubepods"
        self.cgroup_root = cgroup2_root()  # where cgroup2 is mounted, for the runtime and the agent
        self.netns = NETNS / f"sidestep-{self.id}-node"
        self.keep = keep
        self.pods: dict[str, Pod] = {}
        self.agent = Agent(self)
        self.before_agent: Callable[[], None] = lambda: None  # called once the node's directories are there
        self.agent_source: list[str | Path] = []  # where it gets Pods from, if neither directory nor `api`
        self.agent_wrapper: list[str] = []  # what the agent is started through, for another view of the machine

    def __enter__(self) -> "Node":
        try:
            self._make()
        except BaseException:
            remove(self.id)
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _bring(self.run_dir / _SELFTEST.name, _SELFTEST.parent)
        if self.keep and kind is None:
            (self.directory / "owner").write_text(KEPT)
        else:
            remove(self.id)

    @property
    def shim(self) -> Path:
        """The plugin's binary."""
        return REPOSITORY / "build" / "sidestep-cni"

    @property
    def chain(self) -> Chain:
        """bridge, portmap, sidestep-cni."""
        return Chain(self.conflist(), (self.shim.parent, PLUGINS), self.netns)

    def conflist(self) -> dict[str, Any]:
        """The conf list. No other lab has its subnets: agents look for a pod's address in all of the machine."""
        subnets = str(self._subnet(_BRIDGED)), f"fd00:{self.id[:4]}:{self.id[4:]}::/64"
        ranges = [[{"subnet": subnet}] for subnet in subnets]
        return {
            "cniVersion": "1.0.0",
            "name": f"lab-{self.id}",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isDefaultGateway": True,
                    "ipam": {"type": "host-local", "ranges": ranges, "dataDir": str(self.directory / "ipam")},
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
                *([self._entry] if self.is_chained else []),
            ],
        }

    @property
    def _entry(self) -> dict[str, Any]:
        capabilities = {"cgroupPath": True}
        return {"type": "sidestep-cni", "capabilities": capabilities, "cni_agent_run_dir": str(self.run_dir)}

    @property
    def unbridged(self) -> IPv4Network:
        """Addresses for pods that are not on the bridge; no other lab has those either."""
        return self._subnet(_UNBRIDGED)

    def pod(self, name: str, mesh: bool = True, **options: Any) -> Pod:
        """Make a pod by running the chain, with its application; a mesh pod with its Envoy too."""
        pod = Pod(self, name, mesh, **options)
        self.pods[name] = pod
        pod.create()
        return pod

    def outside(self, argv: list[str | Path], **options: Any) -> "subprocess.Popen[Any]":
        """A process in the node's namespace, outside of the mesh."""
        return popen(self.netns, None, argv, 0, 0, **options)

    def entries(self) -> dict[str, int]:
        """How full every table is, and how many pods' links there are."""
        pins = Pins(self.bpffs)
        with Tables(pins) as tables:
            counts = {name: table.count() for name, table in tables.named().items()}
        return counts | {"links": len(list(pins.netns.iterdir()))}

    def policies(self) -> dict[str, int]:
        """The same without the tables that traffic fills."""
        return {name: count for name, count in self.entries().items() if name not in ("uncaptured", "flows")}

    def is_whole(self, entries: dict[str, int]) -> bool:
        """Whether the tables are as full as in `entries`, which are policies(), and all pods' links live.

        Not while their pins are put back.
        """
        try:
            return self.policies() == entries and all(alive for _, alive in linked_pods(Pins(self.bpffs)))
        except (SidestepError, OSError):
            return False

    def wait_for_dead_links(self, count: int) -> None:
        """Wait until the kernel has taken down that many deleted pods' namespaces."""
        pins = Pins(self.bpffs)
        wait_until(lambda: sum(not alive for _, alive in linked_pods(pins)) == count, "namespaces to be gone")

    def _subnet(self, first: int) -> IPv4Network:
        high, low = bytes.fromhex(self.id[:4])
        return IPv4Network(f"10.{first + high}.{low}.0/24")

    def _make(self) -> None:
        for directory in (self.bpffs, self.pods_dir, self.kubepods, self.cgroup / "agent"):
            directory.mkdir(parents=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", self.bpffs], check=True)
        make_netns(self.netns)
        _bring(_SELFTEST, self.run_dir)
        self.before_agent()
        self.agent.start()


def _new_id() -> str:
    """Make a lab's directory, named by its id, whose first four digits no other lab has: they are its subnets."""
    with naming_labs():
        LABS.mkdir(exist_ok=True)
        taken = {each.name[:4] for each in LABS.iterdir()}
        while (subnet := f"{secrets.randbelow(_SUBNETS):04x}") in taken:
            pass
        directory = LABS / f"{subnet}{secrets.token_hex(1)}"
        directory.mkdir()
    (directory / "owner").write_text(identity_of(os.getpid()))
    return directory.name


def _bring(outcome: Path, directory: Path) -> None:
    """Spare a node the self-test that another has had: its outcome says for which kernel and programs it is."""
    with suppress(OSError):  # without it, the self-test is only made again
        directory.mkdir(mode=0o700, exist_ok=True)
        fresh = directory / f"{outcome.name}.{os.getpid()}"
        shutil.copy(outcome, fresh)
        fresh.rename(directory / outcome.name)


def identity_of(pid: int) -> str:
    """A process by id and start time (proc(5), stat, field 22), as ids are used again; empty when it is gone."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{pid} {started}"


def make_netns(path: Path) -> None:
    """A namespace with lo up in which IPv6 addresses are usable at once."""
    subprocess.run(["ip", "netns", "add", path.name], check=True)
    settings = "for each in all default; do echo 0 > /proc/sys/net/ipv6/conf/$each/accept_dad; done; ip link set lo up"
    subprocess.run(["nsenter", f"--net={path}", "sh", "-c", settings], check=True)


def remove(lab: str) -> None:
    """Take down everything of a lab, in whatever state it is."""
    cgroup = cgroup2_root() / f"sidestep-lab-{lab}"
    if cgroup.exists():
        (cgroup / "cgroup.kill").write_text("1")
        wait_until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), f"processes in {cgroup} to end")
    for netns in NETNS.glob(f"sidestep-{lab}-*"):
        subprocess.run(["ip", "netns", "del", netns.name], check=True)
    directory = LABS / lab
    for path in outside(directory):
        path.unlink(missing_ok=True)
    for mount in reversed(mounts()):  # its bpffs, and what a container runtime has mounted
        if mount.path.is_relative_to(directory):
            subprocess.run(["umount", mount.path], check=True)
    shutil.rmtree(directory, ignore_errors=True)
    with naming_labs(), suppress(OSError):
        LABS.rmdir()
    # a runtime makes its cgroups in the v1 hierarchies of a hybrid host too
    for top in (cgroup, *cgroup.parents[1].glob(f"*/{cgroup.name}")):
        remove_cgroup(top)
