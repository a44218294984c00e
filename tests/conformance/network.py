"""The network of two pods of one node, and of what is around them.

    peer ─ eth0 ─ pod ─ eth1 ─ beyond ─ eth2 ─ eth0 ─ neighbour

peer answers for 203.0.113.0/24, 198.51.100.0/24 and 2001:db8::/32 as well, beyond for 10.99.0.0/24 and fd99::/64. Both
pods have 172.17.0.1, which beyond reaches at neighbour and peer at pod, and fe80::1.
"""

import subprocess
from pathlib import Path

from tests.conformance.configs import AmbientConfig, Config

_PEER4, _PEER6 = ("203.0.113.0/24", "198.51.100.0/24"), ("2001:db8::/32",)
_MACS = tuple(f"02:00:00:00:00:0{number}" for number in range(1, 7))
_BEYOND4, _BEYOND6 = "10.99.0.0/24", "fd99::/64"
# the routes of the pod that lead nowhere, by the kind of the route; then those that make it answer for more
_NOWHERE = {
    "unreachable": ("10.88.0.0/24", "fd88::/64"),
    "prohibit": ("10.88.1.0/24", "fd88:0:0:1::/64"),
    "blackhole": ("10.88.2.0/24", "fd88:0:0:2::/64"),
}
_LOCAL4, _LOCAL6 = "10.201.0.0/24", "fd77::/64"
# /proc/sys/net/… of a namespace. tcp_fastopen: clients may (1), and servers that ask for it (2).
_FORWARDING = {"ipv4/conf/all/rp_filter": 0, "ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1}
_FAST_OPEN = {"ipv4/tcp_fastopen": 3}
_DOCKER = ["link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up"]


def connect(config: Config | AmbientConfig, ends: dict[str, Path]) -> None:
    """Cables, addresses and routes."""
    pod, peer, beyond, neighbour = (ends[place] for place in ("pod", "peer", "beyond", "neighbour"))
    for netns in ends.values():
        ip(netns, ["link set lo up"])
        _set(netns, _FAST_OPEN)
    _cable((pod, "eth0", _MACS[0]), (peer, "eth0", _MACS[1]))
    _cable((pod, "eth1", _MACS[2]), (beyond, "eth1", _MACS[3]))
    _cable((neighbour, "eth0", _MACS[4]), (beyond, "eth2", _MACS[5]))
    _set(pod, _FORWARDING | {"ipv4/conf/eth0/rp_filter": 0})
    _make_pod(config, pod)
    _make_peer(peer)
    _make_beyond(beyond)
    _make_neighbour(neighbour)


def _make_pod(config: Config | AmbientConfig, pod: Path) -> None:
    """The pod under test, with addresses of its families only."""
    _introduce(pod, {"eth0": ("10.20.0.1 fd20::1 fe80::9", _MACS[1]), "eth1": ("10.21.0.1 fd21::1", _MACS[3])})
    if 4 in config.families:
        ip(pod, ["addr add 10.20.0.2/24 dev eth0", "addr add 10.20.0.3/24 dev eth0", "addr add 10.21.0.2/24 dev eth1"])
        ip(pod, ["addr add 10.21.0.3/24 dev eth1", *_DOCKER])
        ip(pod, [f"route add {network} via 10.21.0.1" for network in (_BEYOND4, "10.22.0.0/24")])
        ip(
            pod,
            [f"route add local {_LOCAL4} dev lo", *(f"route add {kind} {each[0]}" for kind, each in _NOWHERE.items())],
        )
    if 6 in config.families:
        for address, name in (("fd20::2", "eth0"), ("fd20::3", "eth0"), ("fd21::2", "eth1"), ("fd21::3", "eth1")):
            ip(pod, [f"addr add {address}/64 dev {name} nodad"])
        ip(pod, ["addr add fe80::1/64 dev eth0 nodad"])
        ip(pod, [f"route add {network} via fd21::1" for network in (_BEYOND6, "fd22::/64")])
        ip(
            pod,
            [f"route add local {_LOCAL6} dev lo", *(f"route add {kind} {each[1]}" for kind, each in _NOWHERE.items())],
        )
    if config.has_default_route:
        gateways = {4: "10.20.0.1", 6: "fd20::1"}
        ip(pod, [f"route add default via {gateways[family]}" for family in config.families])


def _make_peer(peer: Path) -> None:
    ip(peer, ["addr add 10.20.0.1/24 dev eth0"])
    ip(peer, [f"addr add {address} dev eth0 nodad" for address in ("fd20::1/64", "fe80::9/64")])
    ip(peer, [f"route add local {network} dev lo" for network in (*_PEER4, *_PEER6)])
    ip(peer, [f"route add {network} via 10.20.0.2" for network in ("10.21.0.3", "172.17.0.1", _BEYOND4, _LOCAL4)])
    ip(peer, [f"route add {network} via fd20::2" for network in ("fd21::3", _BEYOND6, _LOCAL6)])
    _introduce(peer, {"eth0": ("10.20.0.2 10.20.0.3 fd20::2 fd20::3 fe80::1", _MACS[0])})


def _make_beyond(beyond: Path) -> None:
    """What is behind the pod's second interface, on the way to the neighbour."""
    _set(beyond, _FORWARDING)
    for name, four, six in (("eth1", "10.21.0.1/24", "fd21::1/64"), ("eth2", "10.22.0.1/24", "fd22::1/64")):
        ip(beyond, [f"addr add {four} dev {name}", f"addr add {six} dev {name} nodad"])
    ip(beyond, ["addr add fe80::9/64 dev eth2 nodad"])
    ip(beyond, [f"route add local {network} dev lo" for network in (_BEYOND4, _BEYOND6)])
    ip(beyond, ["route add 10.20.0.0/24 via 10.21.0.2", "route add fd20::/64 via fd21::2"])
    ip(beyond, [f"route add {address} via 10.22.0.2" for address in ("172.17.0.1", "10.20.0.3")])
    ip(beyond, ["route add fd20::3 via fd22::2"])
    _introduce(beyond, {"eth1": ("10.21.0.2 10.21.0.3 fd21::2 fd21::3", _MACS[2])})
    _introduce(beyond, {"eth2": ("10.22.0.2 fd22::2 fe80::1", _MACS[4])})


def _make_neighbour(neighbour: Path) -> None:
    """Another pod, which is to have addresses of the first."""
    ip(neighbour, ["addr add 10.22.0.2/24 dev eth0", "addr add fd22::2/64 dev eth0 nodad", *_DOCKER])
    ip(neighbour, ["addr add fe80::1/64 dev eth0 nodad"])
    ip(neighbour, ["route add default via 10.22.0.1", "route add default via fd22::1"])
    _introduce(neighbour, {"eth0": ("10.22.0.1 fd22::1 fe80::9", _MACS[5])})


def _cable(one: tuple[Path, str, str], other: tuple[Path, str, str]) -> None:
    """Two interfaces, each by namespace, name and MAC address, with no addresses but those that they are given."""
    (here, name, mac), (there, far_name, far_mac) = one, other
    far = f"peer name {far_name} address {far_mac} netns {there.name}"
    ip(here, [f"link add {name} address {mac} type veth {far}"])
    for netns, each in ((here, name), (there, far_name)):
        ip(netns, [f"link set {each} addrgenmode none", f"link set {each} up"])


def _set(netns: Path, settings: dict[str, int]) -> None:
    commands = "; ".join(f"echo {value} > /proc/sys/net/{name}" for name, value in settings.items())
    subprocess.run(["nsenter", f"--net={netns}", "sh", "-c", commands], check=True)


def _introduce(netns: Path, neighbours: dict[str, tuple[str, str]]) -> None:
    """Tell who has which address: asking takes up to a second each."""
    for name, (addresses, mac) in neighbours.items():
        ip(netns, [f"neigh replace {each} lladdr {mac} dev {name} nud permanent" for each in addresses.split()])


def ip(netns: Path, commands: list[str], *options: str) -> None:
    """iproute2's ip, a batch at a time."""
    argv = ["ip", *options, "-n", netns.name, "-batch", "-"]
    subprocess.run(argv, input="\n".join(commands) + "\n", text=True, check=True)
