"""One pod with two interfaces and what is around it, twice: captured by Istio's rules, and captured by sidestep.

    peer ─ eth0 ─ pod ─ eth1 ─ beyond

peer answers for 203.0.113.0/24, 198.51.100.0/24 and 2001:db8::/32 as well, beyond for 10.99.0.0/24 and fd99::/64.
"""

import json
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.conformance.configs import Config
from tests.conformance.kinds import LOCAL_ROUTES, NOWHERE, Probe
from tests.conformance.rules import restore_text
from tests.lab.chain import Attachment
from tests.lab.inside import PYTHON, popen
from tests.lab.node import NETNS, Node

HERE = Path(__file__).parent
Seen = dict[str, Any]

_APPS = (22, 53, 80, 443, 5555, 8080, 15002, 15008, 15020, 15021, 15090)
_SERVERS = (22, 53, 80, 443, 5555, 8080, 15001, 15006, 15008, 15020, 15021, 15090)
_PEER4, _PEER6 = ("203.0.113.0/24", "198.51.100.0/24"), ("2001:db8::/32",)
_MACS = tuple(f"02:00:00:00:00:0{number}" for number in range(1, 5))
_BEYOND4, _BEYOND6 = "10.99.0.0/24", "fd99::/64"


class Capture(Protocol):
    """How a pod's traffic is captured: rules, or an enrolment."""

    def __call__(self, undo: ExitStack, config: Config, netns: Path) -> Path | None:
        """Set it up in a namespace that has its addresses; returns the cgroup for the pod's processes, if any."""
        ...


def by_iptables(undo: ExitStack, config: Config, netns: Path) -> Path | None:
    """Load Istio's rules, and what goes with them."""
    policy = config.policy
    for version in (4, 6) if config.captures_ipv6 else (4,):
        command = "iptables-restore" if version == 4 else "ip6tables-restore"
        rules = restore_text(policy, version)
        subprocess.run(["nsenter", f"--net={netns}", command], input=rules, text=True, check=True)
        if policy.mode == "TPROXY":
            commands = ["rule add fwmark 1337 lookup 133", "route add local default dev lo table 133"]
            _ip(netns, commands, f"-{version}")
    if config.captures_ipv6:
        _ip(netns, ["addr add ::6/128 dev lo"])
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
        cgroup = node.kubepods / config.name
        cgroup.mkdir()
        undo.callback(cgroup.rmdir)
        return cgroup


@contextmanager
def world(config: Config, capture: Capture) -> Iterator["World"]:
    """A pod captured in one of the two ways; everything is taken down again."""
    with ExitStack() as undo:
        tag = secrets.token_hex(3)
        ends = {place: NETNS / f"sidestep-{tag}-{place}" for place in ("pod", "peer", "beyond")}
        for netns in ends.values():
            subprocess.run(["ip", "netns", "add", netns.name], check=True)
            undo.callback(subprocess.run, ["ip", "netns", "del", netns.name], check=True)
        _connect(config, ends)
        cgroup = capture(undo, config, ends["pod"])
        made = World(ends, cgroup)
        undo.callback(made.stop)
        made.start(config)
        yield made


class World:
    """The processes of one pod and its surroundings."""

    def __init__(self, ends: dict[str, Path], cgroup: Path | None) -> None:
        self._ends, self._cgroup = ends, cgroup
        self._started: list[subprocess.Popen[str]] = []
        self._probers: dict[str, subprocess.Popen[str]] = {}

    def start(self, config: Config) -> None:
        """Everything that listens, and a prober at each place."""
        starting = [
            self._popen("pod", "standins.py", json.dumps(_pods_listeners(config))),
            self._popen("peer", "standins.py", json.dumps(_servers("peer"))),
            self._popen("beyond", "standins.py", json.dumps(_servers("beyond"))),
        ]
        self._probers = {place: self._popen(place, "prober.py") for place in self._ends}
        for process in (*starting, *self._probers.values()):
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a stand-in does not start; its words are above")

    def run(self, probes: Iterable[Probe]) -> list[Seen]:
        """Make the connections, in order at each place; returns what was seen, in the probes' order."""
        probes = list(probes)
        seen: dict[Probe, Seen] = {}
        for place, prober in self._probers.items():
            here = [probe for probe in probes if probe.place == place]
            assert prober.stdin is not None and prober.stdout is not None
            prober.stdin.write(json.dumps([probe.request() for probe in here]) + "\n")
            prober.stdin.flush()
            seen |= zip(here, json.loads(prober.stdout.readline()), strict=True)
        return [seen[probe] for probe in probes]

    def stop(self) -> None:
        """End every process."""
        for process in self._started:
            process.kill()
            process.communicate()

    def _popen(self, place: str, script: str, *args: str) -> subprocess.Popen[str]:
        cgroup = self._cgroup if place == "pod" else None
        argv = [*PYTHON, (HERE / script).read_text(), *args]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = popen(self._ends[place], cgroup, argv, 0, 0, **pipes)
        self._started.append(process)
        return process


def _pods_listeners(config: Config) -> dict[str, Any]:
    proxy, is_tproxy = config.ids, config.policy.mode == "TPROXY"
    everywhere = ("0.0.0.0", "::")
    tcp = [["app", address, port, 1000, 1000, False] for port in _APPS for address in everywhere]
    for who, port in (("E1", 15001), ("E6", 15006)):
        tcp += [[who, address, port, *proxy, is_tproxy] for address in everywhere]
    tcp += [["D", address, 15053, *proxy, False] for address in ("127.0.0.1", "::1")]
    udp = [["app", address, port, 1000, 1000] for port in (53, 80) for address in everywhere]
    udp += [["D", address, 15053, *proxy] for address in ("127.0.0.1", "::1")]
    return {"tcp": tcp, "udp": udp}


def _servers(who: str) -> dict[str, Any]:
    everywhere = ("0.0.0.0", "::")
    return {
        "tcp": [[who, address, port, 0, 0, False] for port in _SERVERS for address in everywhere],
        "udp": [[who, address, port, 0, 0] for port in (53, 80) for address in everywhere],
    }


def _connect(config: Config, ends: dict[str, Path]) -> None:
    """Cables, addresses and routes."""
    pod, peer, beyond = ends["pod"], ends["peer"], ends["beyond"]
    for name, other, (inside, outside) in (("eth0", peer, _MACS[:2]), ("eth1", beyond, _MACS[2:])):
        _ip(pod, [f"link add {name} address {inside} type veth peer name {name} address {outside} netns {other.name}"])
    settings = "for each in ipv4/conf/all/rp_filter ipv4/conf/eth0/rp_filter; do echo 0 > /proc/sys/net/$each; done; "
    settings += "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
    subprocess.run(["nsenter", f"--net={pod}", "sh", "-c", settings], check=True)
    for end in ends.values():
        _ip(end, ["link set lo up"])
    _ip(pod, ["link set eth0 up", "link set eth1 up"])
    if 4 in config.families:
        _ip(pod, ["addr add 10.20.0.2/24 dev eth0", "addr add 10.20.0.3/24 dev eth0", "addr add 10.21.0.2/24 dev eth1"])
        _ip(pod, ["addr add 10.21.0.3/24 dev eth1"])
    if 6 in config.families:
        for address, name in (("fd20::2", "eth0"), ("fd20::3", "eth0"), ("fd21::2", "eth1"), ("fd21::3", "eth1")):
            _ip(pod, [f"addr add {address}/64 dev {name} nodad"])
    _ip(peer, ["link set eth0 up", "addr add 10.20.0.1/24 dev eth0", "addr add fd20::1/64 dev eth0 nodad"])
    _ip(beyond, ["link set eth1 up", "addr add 10.21.0.1/24 dev eth1", "addr add fd21::1/64 dev eth1 nodad"])
    _ip(peer, [f"route add local {network} dev lo" for network in (*_PEER4, *_PEER6)])
    _ip(peer, ["route add 10.21.0.3 via 10.20.0.2", f"route add {_BEYOND4} via 10.20.0.2"])
    _ip(peer, ["route add fd21::3 via fd20::2", f"route add {_BEYOND6} via fd20::2"])
    _ip(
        peer,
        [f"route add {network} via {via}" for network, via in zip(LOCAL_ROUTES, ("10.20.0.2", "fd20::2"), strict=True)],
    )
    _ip(beyond, [f"route add local {network} dev lo" for network in (_BEYOND4, _BEYOND6)])
    _ip(beyond, ["route add 10.20.0.0/24 via 10.21.0.2", "route add fd20::/64 via fd21::2"])
    _introduce(pod, {"eth0": ("10.20.0.1 fd20::1", _MACS[1]), "eth1": ("10.21.0.1 fd21::1", _MACS[3])})
    _introduce(peer, {"eth0": ("10.20.0.2 10.20.0.3 fd20::2 fd20::3", _MACS[0])})
    _introduce(beyond, {"eth1": ("10.21.0.2 10.21.0.3 fd21::2 fd21::3", _MACS[2])})
    for index, version, gateway, behind in (
        (0, 4, "10.20.0.1", f"{_BEYOND4} via 10.21.0.1"),
        (1, 6, "fd20::1", f"{_BEYOND6} via fd21::1"),
    ):
        if version in config.families:
            nowhere = [f"route add {kind} {networks[index]}" for kind, networks in NOWHERE.items()]
            local = f"route add local {LOCAL_ROUTES[index]} dev lo"
            default = [f"route add default via {gateway}"] if config.has_default_route else []
            _ip(pod, [f"route add {behind}", *nowhere, local, *default])


def _introduce(netns: Path, neighbours: dict[str, tuple[str, str]]) -> None:
    """Tell who has which address: asking takes up to a second each."""
    for name, (addresses, mac) in neighbours.items():
        _ip(netns, [f"neigh replace {each} lladdr {mac} dev {name} nud permanent" for each in addresses.split()])


def _ip(netns: Path, commands: list[str], *options: str) -> None:
    """iproute2's ip, a batch at a time."""
    argv = ["ip", *options, "-n", netns.name, "-batch", "-"]
    subprocess.run(argv, input="\n".join(commands) + "\n", text=True, check=True)
