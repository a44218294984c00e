"""The network of one pod: two interfaces, and what is reached through them.

    peer ─ eth0 ─ pod ─ eth1 ─ beyond

peer answers for 203.0.113.0/24, 198.51.100.0/24 and 2001:db8::/32 as well, beyond for 10.99.0.0/24 and fd99::/64.
"""

import subprocess
from pathlib import Path

from tests.conformance.configs import Config

_PEER4, _PEER6 = ("203.0.113.0/24", "198.51.100.0/24"), ("2001:db8::/32",)
_MACS = tuple(f"02:00:00:00:00:0{number}" for number in range(1, 5))
_BEYOND4, _BEYOND6 = "10.99.0.0/24", "fd99::/64"

_FAST_OPEN = 3  # net.ipv4.tcp_fastopen of each namespace: clients may (1), and servers that ask for it (2)


def connect(config: Config, ends: dict[str, Path]) -> None:
    """Cables, addresses and routes."""
    pod, peer, beyond = ends["pod"], ends["peer"], ends["beyond"]
    for name, other, (inside, outside) in (("eth0", peer, _MACS[:2]), ("eth1", beyond, _MACS[2:])):
        ip(pod, [f"link add {name} address {inside} type veth peer name {name} address {outside} netns {other.name}"])
    settings = "for each in ipv4/conf/all/rp_filter ipv4/conf/eth0/rp_filter; do echo 0 > /proc/sys/net/$each; done; "
    settings += "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
    subprocess.run(["nsenter", f"--net={pod}", "sh", "-c", settings], check=True)
    for end in ends.values():
        ip(end, ["link set lo up"])
        fast_open = f"echo {_FAST_OPEN} > /proc/sys/net/ipv4/tcp_fastopen"
        subprocess.run(["nsenter", f"--net={end}", "sh", "-c", fast_open], check=True)
    ip(pod, ["link set eth0 up", "link set eth1 up"])
    if 4 in config.families:
        ip(pod, ["addr add 10.20.0.2/24 dev eth0", "addr add 10.20.0.3/24 dev eth0", "addr add 10.21.0.2/24 dev eth1"])
        ip(pod, ["addr add 10.21.0.3/24 dev eth1"])
    if 6 in config.families:
        for address, name in (("fd20::2", "eth0"), ("fd20::3", "eth0"), ("fd21::2", "eth1"), ("fd21::3", "eth1")):
            ip(pod, [f"addr add {address}/64 dev {name} nodad"])
    ip(peer, ["link set eth0 up", "addr add 10.20.0.1/24 dev eth0", "addr add fd20::1/64 dev eth0 nodad"])
    ip(beyond, ["link set eth1 up", "addr add 10.21.0.1/24 dev eth1", "addr add fd21::1/64 dev eth1 nodad"])
    ip(peer, [f"route add local {network} dev lo" for network in (*_PEER4, *_PEER6)])
    ip(peer, ["route add 10.21.0.3 via 10.20.0.2", f"route add {_BEYOND4} via 10.20.0.2"])
    ip(peer, ["route add fd21::3 via fd20::2", f"route add {_BEYOND6} via fd20::2"])
    ip(beyond, [f"route add local {network} dev lo" for network in (_BEYOND4, _BEYOND6)])
    ip(beyond, ["route add 10.20.0.0/24 via 10.21.0.2", "route add fd20::/64 via fd21::2"])
    _introduce(pod, {"eth0": ("10.20.0.1 fd20::1", _MACS[1]), "eth1": ("10.21.0.1 fd21::1", _MACS[3])})
    _introduce(peer, {"eth0": ("10.20.0.2 10.20.0.3 fd20::2 fd20::3", _MACS[0])})
    _introduce(beyond, {"eth1": ("10.21.0.2 10.21.0.3 fd21::2 fd21::3", _MACS[2])})
    if 4 in config.families:
        ip(pod, ["route add default via 10.20.0.1", f"route add {_BEYOND4} via 10.21.0.1"])
    if 6 in config.families:
        ip(pod, ["route add default via fd20::1", f"route add {_BEYOND6} via fd21::1"])


def _introduce(netns: Path, neighbours: dict[str, tuple[str, str]]) -> None:
    """Tell who has which address: asking takes up to a second each."""
    for name, (addresses, mac) in neighbours.items():
        ip(netns, [f"neigh replace {each} lladdr {mac} dev {name} nud permanent" for each in addresses.split()])


def ip(netns: Path, commands: list[str], *options: str) -> None:
    """iproute2's ip, a batch at a time."""
    argv = ["ip", *options, "-n", netns.name, "-batch", "-"]
    subprocess.run(argv, input="\n".join(commands) + "\n", text=True, check=True)
