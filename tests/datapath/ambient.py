"""Pods in ambient mode on a wire, and the ztunnels of their node: doubles in cgroups of their own."""

import secrets
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cni.policy.ambient_policy import AmbientPolicy
from tests.datapath.wires import DEFAULT, Kernel, Wire
from tests.lab.cgroups import remove_cgroup
from tests.lab.inside import popen
from tests.lab.ztunnel import Told


@dataclass
class Ztunnels:
    """The ztunnels of a node, which the programs know unless a test says otherwise."""

    kernel: Kernel
    undo: ExitStack
    cgroups: set[int] = field(default_factory=set)

    def start(self, is_known: bool = True, tunnelled: tuple[str, ...] = ()) -> Told:
        """One more."""
        cgroup = self.kernel.cgroup / f"ztunnel-{secrets.token_hex(3)}"
        cgroup.mkdir()
        self.undo.callback(remove_cgroup, cgroup)
        if is_known:
            self.cgroups.add(cgroup.stat().st_ino)
            self.kernel.tables.set_ztunnels(self.cgroups)
        told = Told(lambda argv: _started(cgroup, argv), *tunnelled)
        self.undo.callback(told.stop)
        self.kernel.procfs.show(told.pid)
        self.undo.callback(self.kernel.procfs.hide, told.pid)
        return told

    def forget(self) -> None:
        """The programs know none any more."""
        self.cgroups.clear()
        self.kernel.tables.set_ztunnels(())


def _started(cgroup: Path, argv: list[str]) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = popen(Path("/proc/self/ns/net"), cgroup, argv, 0, 0, **pipes)
    return process


def in_ambient(wire: Wire, policy: AmbientPolicy = DEFAULT) -> Wire:
    """Enrol a wire's pod, with an application in it and a server outside; no ztunnel serves it yet."""
    wire.enrol_ambient(policy)
    wire.pod.serve("app", "8080", "15020")
    wire.peer.serve("remote", "8080", "9090", "53", uid=0)
    return wire
