"""One pod and what is around it (network.py), twice: captured by Istio's rules, and captured by sidestep."""

import json
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.conformance.configs import Config
from tests.conformance.network import connect, ip
from tests.conformance.probe import Probe
from tests.conformance.rules import restore_text
from tests.lab.chain import Attachment
from tests.lab.inside import PYTHON, popen
from tests.lab.node import NETNS, Node

HERE = Path(__file__).parent
Seen = dict[str, Any]

_APPS = (22, 53, 80, 443, 5555, 8080, 15002, 15008, 15020, 15021, 15090)
_SERVERS = (22, 53, 80, 443, 5555, 8080, 15001, 15006, 15008, 15020, 15021, 15090)


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
            ip(netns, commands, f"-{version}")
    if config.captures_ipv6:
        ip(netns, ["addr add ::6/128 dev lo"])
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
        connect(config, ends)
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
        tcp += [[who, address, port, *proxy, is_tproxy] for address in everywhere] * config.workers
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
