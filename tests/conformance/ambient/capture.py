"""Two ways to capture a pod in ambient mode, with a neighbour that has a sidecar: Istio's rules, or sidestep."""

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

from bpf.layout import AddressKey
from cni.enrolment.admission import Admission
from cni.enrolment.entries import Identity
from cni.enrolment.follow import Follower
from cni.enrolment.strict_proxies import StrictProxies
from cni.netns.sandbox import own_cookie, visit
from tests.conformance.ambient.rules import COMMANDS, ambient_restore_text
from tests.conformance.capture import by_rules, claim
from tests.conformance.configs import AmbientConfig, Config
from tests.conformance.network import ip
from tests.datapath.adopting import Listed
from tests.datapath.wires import Kernel
from tests.lab.cgroups import remove_cgroup
from tests.lab.waiting import wait_until


class ByRules:
    """Load Istio's rules, and what goes with them."""

    ztunnel = None  # any cgroup will do

    def __call__(self, undo: ExitStack, config: Config | AmbientConfig, netns: Path) -> Path | None:
        """Set it up in a namespace."""
        if isinstance(config, Config):
            return by_rules(undo, config, netns)
        for version in (4, 6) if config.captures_ipv6 else (4,):
            command = "iptables-restore" if version == 4 else "ip6tables-restore"
            rules = ambient_restore_text(config.policy, version)
            subprocess.run(["nsenter", f"--net={netns}", command], input=rules, text=True, check=True)
            ip(netns, list(COMMANDS), f"-{version}")
        return None


class BySidestep:
    """Enrol as the agent does; made by by_sidestep()."""

    def __init__(self, kernel: Kernel, admission: Admission) -> None:
        self._kernel, self._admission = kernel, admission
        self.ztunnel = kernel.cgroup / "ztunnel"

    def __call__(self, undo: ExitStack, config: Config | AmbientConfig, netns: Path) -> Path | None:
        """Set it up in a namespace; returns the cgroup of the pod's processes."""
        cgroup = self._kernel.cgroup / f"{config.name}-{secrets.token_hex(3)}"
        cgroup.mkdir()
        undo.callback(remove_cgroup, cgroup)
        with netns.open() as opened:
            cookie = visit(opened.fileno(), lambda _: own_cookie())
            identity = Identity(config.name, config.name, "default", config.name, "net", "eth0")
            self._admission.admit_as(identity, config.policy, opened.fileno())
        undo.callback(self._admission.release, cookie)
        if isinstance(config, Config):
            claim(config, netns)
            keys = [AddressKey.of(cookie, ip_address(each)) for each in config.claims]
            addresses = self._kernel.tables.addresses
            wait_until(lambda: all(addresses.get(key) for key in keys), "the addresses that the pod has added")
        return cgroup


@contextmanager
def by_sidestep(kernel: Kernel) -> Iterator[BySidestep]:
    """With a cgroup for the node's ztunnel, which the programs know."""
    proxies = StrictProxies(Listed(), kernel.tables, lambda: [kernel.cgroup])
    follower = Follower(kernel.enrolments, proxies)
    made = BySidestep(kernel, Admission(kernel.enrolments, follower))
    made.ztunnel.mkdir()
    try:
        kernel.tables.set_ztunnels((made.ztunnel.stat().st_ino,))
        with follower.running():
            yield made
    finally:
        kernel.tables.set_ztunnels(())
        remove_cgroup(made.ztunnel)
