"""Two ways to capture a pod's traffic: Istio's rules as we write them, or sidestep's enrolment.

A third is in istio_plugin.py.
"""

import secrets
import subprocess
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

import yaml

from bpf.pins import Pins
from bpf.tables import Tables
from installer.commands.pods.enrolled_pods import find_pod
from tests.conformance.configs import AmbientConfig, Config
from tests.conformance.network import ip
from tests.conformance.rules import restore_text
from tests.lab.chain import Attachment
from tests.lab.node import Node
from tests.lab.waiting import wait_until


class Capture(Protocol):
    """How a pod's traffic is captured: rules, or an enrolment."""

    def __call__(self, undo: ExitStack, config: Config, netns: Path) -> Path | None:
        """Set it up in a namespace that has its addresses; returns the cgroup for the pod's processes, if any."""
        ...


class AmbientCapture(Protocol):
    """The same of pods in ambient mode too."""

    def __call__(self, undo: ExitStack, config: Config | AmbientConfig, netns: Path) -> Path | None:
        """As Capture has it."""
        ...


def by_rules(undo: ExitStack, config: Config, netns: Path) -> Path | None:
    """Load Istio's rules, and what goes with them."""
    policy = config.policy
    for version in (4, 6) if config.captures_ipv6 else (4,):
        command = "iptables-restore" if version == 4 else "ip6tables-restore"
        rules = restore_text(policy, version)
        subprocess.run(["nsenter", f"--net={netns}", command], input=rules, text=True, check=True)
        if policy.mode == "TPROXY" and (policy.inbound_all or policy.include_inbound_ports):
            commands = ["rule add fwmark 1337 lookup 133", "route add local default dev lo table 133"]
            ip(netns, commands, f"-{version}")
    if config.captures_ipv6:
        ip(netns, ["addr add ::6/128 dev lo"])
    claim(config, netns)
    return None


class BySidestep:
    """Enrol through the real shim and agent of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __call__(self, undo: ExitStack, config: Config, netns: Path) -> Path | None:
        node, chain = self._node, self._node.chain
        manifest = node.pods_dir / f"{config.name}.yaml"
        manifest.write_text(yaml.safe_dump(config.manifest()))
        undo.callback(manifest.unlink)
        names = {"K8S_POD_NAME": config.name, "K8S_POD_NAMESPACE": "default"}
        attachment = Attachment(secrets.token_hex(16), netns, names)
        previous = {"cniVersion": "1.0.0", "interfaces": [], "ips": []}
        plugin = chain.conflist["plugins"][-1]
        chain.run("ADD", plugin, attachment, previous)
        undo.callback(chain.run, "DEL", plugin, attachment, previous)
        claim(config, netns)
        wait_until(lambda: self._has_all_claims(config), "the addresses that the pod has added")
        cgroup = node.kubepods / config.name
        cgroup.mkdir()
        undo.callback(cgroup.rmdir)
        return cgroup

    def _has_all_claims(self, config: Config) -> bool:
        pins = Pins(self._node.bpffs)
        with Tables(pins) as tables:
            known = find_pod(pins, tables, f"default/{config.name}").addresses
        return known >= {ip_address(each) for each in config.claims}


def claim(config: Config, netns: Path) -> None:
    """Add the addresses that a running pod takes."""
    for each in config.claims:
        ip(netns, [f"addr add {each}/{128 if ':' in each else 32} dev lo" + (" nodad" if ":" in each else "")])
