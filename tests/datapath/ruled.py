"""Istio's rules in the pod of a wire, as its CNI plugin would load them."""

import subprocess
from pathlib import Path

from cni.policy.annotations import CapturePolicy
from tests.conformance.rules import restore_text
from tests.datapath.wires import PROXY, Wire, ip_command

SHADOW = CapturePolicy(dual_stack=True)


def restore(netns: Path, version: int, text: str) -> None:
    """Load rules for one family (4 or 6) beside those that are there."""
    command = "iptables-restore" if version == 4 else "ip6tables-restore"
    subprocess.run(["nsenter", f"--net={netns}", command, "--noflush"], input=text, text=True, check=True)


def rule(netns: Path, arguments: str, version: int = 4) -> None:
    """One call of iptables or ip6tables."""
    command = "iptables" if version == 4 else "ip6tables"
    subprocess.run(["nsenter", f"--net={netns}", command, "-w", *arguments.split()], check=True)


def load_rules(netns: Path, policy: CapturePolicy = SHADOW) -> None:
    """Istio's rules of both families, and the address that comes with those of IPv6."""
    for version in (4, 6) if policy.dual_stack else (4,):
        restore(netns, version, restore_text(policy, version))
    if policy.dual_stack and "::6" not in _addresses(netns):
        ip_command("-n", netns.name, "addr", "add", "::6/128", "dev", "lo", "nodad")


def flush_rules(netns: Path) -> None:
    """As if nobody had ever loaded any."""
    for version in (4, 6):
        for table in ("nat", "mangle", "raw"):
            rule(netns, f"-t {table} -F", version=version)
            rule(netns, f"-t {table} -X", version=version)


def _addresses(netns: Path) -> str:
    return subprocess.run(
        ["ip", "-n", netns.name, "-o", "addr", "show", "dev", "lo"], capture_output=True, text=True, check=True
    ).stdout


def serve_all(wire: Wire) -> None:
    """A proxy and an application in the pod, and servers outside."""
    wire.pod.serve("outbound", "15001", uid=PROXY)
    wire.pod.serve("inbound", "15006", uid=PROXY)
    wire.pod.serve("app", "8080", "9000", "15008", "15020")
    wire.peer.serve("remote", "8080", "9090", "15020", uid=0)
