"""A node with its runtime and its API server, and what is asked of its pods."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bpf.kernel import cgroup2_root, mounts
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.enrolled import Enrolled
from tests.lab.apiserver import ApiServer
from tests.lab.cgroups import remove_cgroup
from tests.lab.containerd import Containerd, pure_cgroup2
from tests.lab.cri import APP_PORT, CriPod, Refused
from tests.lab.node import REPOSITORY, Node
from tests.lab.waiting import wait_until

DAEMONSET = ("istio-system", "istio-cni-node")
PRIMARY = "10-lab.conflist"
OWNED = "00-sidestep-cni.conflist"


class Cluster:
    """One node of it. `layout` is the view of cgroups that agent and runtime have: "hybrid" or "pure"."""

    def __init__(self, layout: str, running: ExitStack) -> None:
        self.api = running.enter_context(ApiServer().running())
        self.api.daemonsets[DAEMONSET] = {"metadata": {"name": DAEMONSET[1]}}
        self.node = Node(api=self.api)
        wrapper = pure_cgroup2() if layout == "pure" else []
        self.node.agent_wrapper = wrapper
        self.runtime = Containerd(self.node, wrapper)
        kubepods = self.node.kubepods
        if layout == "pure":
            kubepods = Path("/sys/fs/cgroup") / kubepods.relative_to(cgroup2_root())
        self.node.agent.cgroup = kubepods
        self._directories: list[str | Path] = [
            "--mounted-cni-bin-dir",
            self.runtime.bin,
            "--mounted-cni-net-dir",
            self.runtime.net,
        ]
        self.node.agent.options += ["--install", "--shim", self.node.shim, *self._directories]
        self.node.before_agent = self.runtime.prepare
        running.enter_context(self.node)
        running.callback(self.runtime.stop)
        self.runtime.write_conf()
        self.runtime.start()
        self.runtime.import_images()
        self.wait_until_installed()
        self.pods: dict[str, CriPod] = {}
        self.orphans: set[str] = set()  # addresses of sandboxes that the runtime could not take down

    def pod(self, name: str, mesh: bool = True) -> CriPod:
        """Make one, as kubelet does. Raises Refused."""
        pod = CriPod(self.runtime, name, mesh)
        pod.create()
        self.pods[name] = pod
        return pod

    def pod_or_nothing(self, name: str) -> CriPod | None:
        """A mesh pod, unless it was refused."""
        try:
            return self.pod(name)
        except Refused:
            return None

    def wait_until_installed(self, conf: str = PRIMARY) -> None:
        """Until the plugin is there, and the last in that configuration."""
        wait_until(lambda: self.is_installed(conf), f"the plugin in {conf}", 10)

    def is_installed(self, conf: str = PRIMARY) -> bool:
        has_plugin = (self.runtime.bin / "sidestep-cni").exists() and (self.runtime.net / conf).exists()
        return has_plugin and self.plugins(conf)[-1] == "sidestep-cni"

    def have_repaired(self, tamper: Callable[[], object]) -> None:
        """Wait until the plugin is there again, and in the chain: sooner than the agent looks without being told."""
        tamper()
        wait_until(self.is_installed, "the repair", 10)

    def plugins(self, conf: str = PRIMARY) -> list[str]:
        """By their types, in their order."""
        return [plugin["type"] for plugin in json.loads((self.runtime.net / conf).read_text())["plugins"]]

    def proxies_between(self, one: CriPod, other: CriPod, ip: str = "") -> set[str]:
        """Which proxies handled a request from inside one container to the other pod's application, which answered.

        Told by the access logs, in which the connection must have its original destination. `ip` is one of the other
        pod's addresses, the first if none is given.
        """
        ip = ip or other.ip
        destination = f"[{ip}]:{APP_PORT}" if ":" in ip else f"{ip}:{APP_PORT}"
        for pod in (one, other):
            pod.envoy.connections()
        assert one.get(ip) == other.name
        deadline = time.monotonic() + 2
        seen: set[str] = set()
        while len(seen) < 2 and time.monotonic() < deadline:
            for pod in (one, other):
                logged = pod.envoy.connections()
                seen |= {f"{pod.name} {each.listener}" for each in logged if each.original == destination}
            time.sleep(0.02)
        return seen

    def is_captured(self, one: CriPod, other: CriPod, ip: str = "") -> bool:
        """Whether it was both: outbound and inbound."""
        return self.proxies_between(one, other, ip) == {f"{one.name} outbound", f"{other.name} inbound"}

    def captured_soon(self, one: CriPod, other: CriPod) -> None:
        """A pod that was made while the plugin was away has to be in the mesh long before the next reconciliation."""
        wait_until(lambda: self.is_captured(one, other) and self.is_captured(other, one), "capture both ways", 15)

    def seconds_until_enrolled(self, pod: CriPod) -> float:
        """How long a pod that runs stays outside of the mesh from now on."""
        begun = time.monotonic()
        wait_until(lambda: pod.uid in self._enrolled(), f"{pod.name} to be enrolled", 15)
        return time.monotonic() - begun

    def _enrolled(self) -> set[str]:
        pins = Pins(self.node.bpffs)
        with Tables(pins) as tables:
            return {identity.uid for identity in Enrolled(pins, tables).identities().values()}

    def another_version(self, directory: Path) -> Path:
        """This one's source with other programs."""
        for package in ("bpf", "cni", "installer"):
            shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
        source = directory / "bpf" / "facts.c"
        source.write_text(source.read_text() + "\n/* another version */\n")
        return directory

    def uninstall(self, *more: str) -> list[str]:
        """`sidestep uninstall`; what it said."""
        argv: list[str | Path] = [sys.executable, "-m", "installer", "uninstall", *self._directories]
        argv += ["--bpffs", self.node.bpffs, "--cni-agent-run-dir", self.node.run_dir, *more]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def addresses(self) -> list[str]:
        """Those that are given to pods, by the primary plugin's own files."""
        leases = (self.node.directory / "ipam" / f"lab-{self.node.id}").glob("[0-9a-f]*[.:]*")
        return [each.name for each in leases]

    def lose_power(self) -> None:
        """A reboot's first half: processes, cgroups, bpffs and what is on a tmpfs are gone, and nothing runs yet."""
        (self.node.cgroup / "cgroup.kill").write_text("1")
        events = self.node.cgroup / "cgroup.events"
        wait_until(lambda: "populated 0" in events.read_text(), "all processes to end")
        self.node.agent.kill()
        self.runtime.kill()
        # another mount namespace may have a copy of the bpffs, which then outlives its mount
        shutil.rmtree(self.node.bpffs / "sidestep")
        for mount in reversed(mounts()):
            if mount.path.is_relative_to(self.node.directory):
                subprocess.run(["umount", mount.path], check=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", self.node.bpffs], check=True)
        for temporary in (self.node.run_dir, self.runtime.directory / "state", self.runtime.directory / "runc-state"):
            shutil.rmtree(temporary)
        for pod in self.node.kubepods.glob("*/"):
            remove_cgroup(pod)
