"""Ambient mode: kubelet's own connections reach the application, and nobody else's do."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bpf.layout import KubeletEntry
from cni.enrolment.kubelet import Kubelet
from tests.datapath.ambient import Ztunnels, in_ambient
from tests.datapath.wires import Kernel, Wire
from tests.lab.cgroups import remove_cgroup
from tests.lab.inside import PYTHON, popen
from tests.lab.waiting import wait_until

FAMILIES = ["ip4", "ip6"]
# says who has answered at each address and port that it is told
KUBELET = """
import json, socket, sys
name = sys.argv[1]
open("/proc/self/comm", "w").write(name)
print("ready", flush=True)
for line in sys.stdin:
    host, port = line.split()
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    s.settimeout(3)
    try:
        s.connect((host, int(port)))
        said = json.loads(s.makefile().readline())
    except OSError as error:
        said = {"error": error.strerror or str(error)}
    s.close()
    print(json.dumps(said), flush=True)
"""


@dataclass
class Prober:
    """A process outside of the pod, in a cgroup of its own."""

    process: "subprocess.Popen[str]"
    cgroup: Path

    def asks(self, host: object, port: int = 8080) -> Any:
        """What it sees of one connection."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{host} {port}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def undo(kernel: Kernel) -> Iterator[ExitStack]:
    """What ends with a test."""
    with ExitStack() as made:
        made.callback(kernel.tables.set_kubelet, KubeletEntry())
        yield made


@pytest.fixture
def mesh(wire: Wire, kernel: Kernel, undo: ExitStack) -> Wire:
    """A pod that ztunnel serves."""
    ztunnels = Ztunnels(kernel, undo)
    undo.callback(ztunnels.forget)
    in_ambient(wire)
    assert ztunnels.start().add("uid", wire.pod.path) == "ok"
    return wire


@pytest.fixture
def prober(mesh: Wire, undo: ExitStack) -> Callable[..., Prober]:
    """Starts one at the other end of the wire: its name, and its cgroup if that is to be another than its own."""

    def start(name: str, cgroup: Path | None = None) -> Prober:
        kernel = mesh.kernel
        own = cgroup or kernel.cgroup.with_name(f"{kernel.cgroup.name}-{name}")
        if not own.exists():
            own.mkdir()
            undo.callback(remove_cgroup, own)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = popen(mesh.peer.path, own, [*PYTHON, KUBELET, name], 0, 0, **pipes)
        undo.callback(process.communicate)
        undo.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        kernel.procfs.show(process.pid)
        undo.callback(kernel.procfs.hide, process.pid)
        return Prober(process, own)

    return start


def look(kernel: Kernel) -> str:
    """What the agent does."""
    return Kubelet(kernel.pins, kernel.tables, kernel.procfs.path).look()


@pytest.mark.parametrize("family", FAMILIES)
def test_kubelets_connections_reach_the_app_and_others_of_its_node_ztunnel(
    mesh: Wire, prober: Callable[..., Prober], family: str
) -> None:
    pod, peer = getattr(mesh.pod, family), getattr(mesh.peer, family)
    kubelet, other = prober("kubelet"), prober("other")
    assert kubelet.asks(pod)["who"] == "ztunnel-inbound"
    assert look(mesh.kernel) == ""
    for _ in range(3):
        seen = kubelet.asks(pod)
        assert (seen["who"], seen["peer"][0]) == ("app", str(peer))
        assert other.asks(pod)["who"] == "ztunnel-inbound"
    assert kubelet.asks(pod, 9999) == {"error": "Connection refused"}
    wait_until(lambda: not list(mesh.kernel.tables.dials.every_key()), "the records of closed connections to go")


def test_a_restarted_kubelet_is_found_in_its_new_cgroup(mesh: Wire, prober: Callable[..., Prober]) -> None:
    first = prober("kubelet")
    assert (look(mesh.kernel), look(mesh.kernel)) == ("", "")
    first.process.kill()
    first.process.wait()
    remove_cgroup(first.cgroup)
    second = prober("kubelet")
    assert look(mesh.kernel) == ""
    assert second.asks(mesh.pod.ip4)["who"] == "app"


def test_a_container_that_calls_itself_kubelet_is_none(mesh: Wire, prober: Callable[..., Prober]) -> None:
    assert "no process" in look(mesh.kernel)
    pretender = prober("kubelet", mesh.kernel.cgroup)
    assert "no process" in look(mesh.kernel)
    assert pretender.asks(mesh.pod.ip4)["who"] == "ztunnel-inbound"


def test_a_kubelet_with_the_pods_below_it_is_not_taken(mesh: Wire, prober: Callable[..., Prober]) -> None:
    """Whoever is in that cgroup would pass for kubelet."""
    everybody = prober("kubelet", mesh.kernel.cgroup.parent)
    assert look(mesh.kernel) in (
        "kubelet is in the root of cgroup2, with everybody else",
        f"kubelet's cgroup {mesh.kernel.cgroup.parent} has those of pods below it",
    )
    assert everybody.asks(mesh.pod.ip4)["who"] == "ztunnel-inbound"
