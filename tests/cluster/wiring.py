"""How hosts reach each other: a bridge on the control plane, a cable to each node, and routes to the pods of each."""

import subprocess
from collections.abc import Sequence

from tests.cluster import shape
from tests.cluster.host import Host

_BRIDGE = "wire"


def connect(control: Host, nodes: Sequence[Host]) -> None:
    """Wire hosts that have been booted; nothing leads out of the cluster.

    Routes to pods are made too, unless the network makes those between nodes: then `route_to_pods` makes the rest.
    """
    _ip(control, "link", "add", _BRIDGE, "type", "bridge")
    _give(control, _BRIDGE)
    for node in nodes:
        plug_in(control, node, [each for each in nodes if each is not node])
        if shape.network() == shape.BRIDGE:
            route_to_pods(control, node, node.place.pod_ranges)


def plug_in(control: Host, node: Host, others: Sequence[Host]) -> None:
    """Wire one node that has been booted, the first time or again. The others' routes to its pods go by its address."""
    cable = _cable(node)
    _ip(control, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node.netns.name)
    _ip(control, "link", "set", cable, "master", _BRIDGE, "up")
    _give(node, "eth0")
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        node.run(["sh", "-c", f"echo 1 > /proc/sys/net/{setting}"])
    for gateway in control.place.ips:
        _ip(node, "route", "add", "default", "via", gateway)
    for other in others:
        if shape.network() == shape.BRIDGE:
            route_to_pods(node, other, other.place.pod_ranges)


def route_to_pods(host: Host, node: Host, ranges: Sequence[str]) -> None:
    """From a host to the pods of a node, whose ranges are these: an IPv4 one and an IPv6 one."""
    for pods, gateway in zip(ranges, node.place.ips, strict=True):
        _ip(host, "route", "add", pods, "via", gateway)


def unplug(control: Host, node: Host) -> None:
    """Take its cable away, both ends of it."""
    _ip(control, "link", "del", _cable(node))


def _cable(node: Host) -> str:
    return f"to-{node.name}"


def _give(host: Host, device: str) -> None:
    for address in host.place.addresses:
        _ip(host, "address", "add", address, "dev", device)
    _ip(host, "link", "set", device, "up")


def _ip(host: Host, *argv: str) -> None:
    subprocess.run(["ip", "-n", host.netns.name, *argv], check=True)
