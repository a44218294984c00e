"""One pod and what is around it (network.py), twice: captured by Istio's rules, and captured by sidestep."""

import json
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.conformance.capture import AmbientCapture, Capture
from tests.conformance.configs import NEIGHBOUR, AmbientConfig, Config
from tests.conformance.network import connect
from tests.conformance.probe import Probe
from tests.lab.inside import PYTHON, popen
from tests.lab.node import NETNS

HERE = Path(__file__).parent
Seen = dict[str, Any]

_APPS = (22, 53, 80, 443, 5555, 8080, 15002, 15008, 15020, 15021, 15090)
_SERVERS = (22, 53, 80, 443, 5555, 8080, 15001, 15006, 15008, 15020, 15021, 15090)


@contextmanager
def world(
    config: Config | AmbientConfig, capture: Capture | AmbientCapture, ztunnel: Path | None = None
) -> Iterator["World"]:
    """A pod captured in one of the two ways; everything is taken down again. `ztunnel` is the cgroup of ztunnel."""
    with ExitStack() as undo:
        tag = secrets.token_hex(3)
        ends = {place: NETNS / f"sidestep-{tag}-{place}" for place in ("pod", "peer", "beyond", "neighbour")}
        for netns in ends.values():
            subprocess.run(["ip", "netns", "add", netns.name], check=True)
            undo.callback(subprocess.run, ["ip", "netns", "del", netns.name], check=True)
        connect(config, ends)
        pods: dict[str, Any] = {"pod": config, "neighbour": NEIGHBOUR}
        cgroups = {place: capture(undo, each, ends[place]) for place, each in pods.items()}
        if isinstance(config, AmbientConfig):
            ends["ztunnel"], cgroups["ztunnel"] = ends["pod"], ztunnel
        made = World(ends, cgroups)
        undo.callback(made.stop)
        made.start(config)
        yield made


class World:
    """The processes of one pod and its surroundings."""

    def __init__(self, ends: dict[str, Path], cgroups: dict[str, Path | None]) -> None:
        self._ends, self._cgroups = ends, cgroups
        self._started: list[subprocess.Popen[str]] = []
        self._probers: dict[str, subprocess.Popen[str]] = {}

    def start(self, config: Config | AmbientConfig) -> None:
        """Everything that listens, and a prober at each place."""
        if isinstance(config, Config):
            of_pod = [self._listen("pod", _pods_listeners(config, ("app", "E1", "E6", "D")))]
        else:
            of_pod = [
                self._listen("pod", _applications("app", 15008)),
                self._listen("ztunnel", _ztunnels("E1", "E6", "D")),
            ]
        starting = [
            *of_pod,
            self._listen("neighbour", _pods_listeners(NEIGHBOUR, ("neighbour", "N1", "N6", "ND"))),
            self._listen("peer", _servers("peer")),
            self._listen("beyond", _servers("beyond")),
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

    def _listen(self, place: str, listeners: dict[str, Any]) -> subprocess.Popen[str]:
        return self._popen(place, "standins.py", json.dumps(listeners))

    def _popen(self, place: str, script: str, *args: str) -> subprocess.Popen[str]:
        argv = [*PYTHON, (HERE / script).read_text(), *args]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = popen(self._ends[place], self._cgroups.get(place), argv, 0, 0, **pipes)
        self._started.append(process)
        return process


def _pods_listeners(config: Config, names: tuple[str, str, str, str]) -> dict[str, Any]:
    """Of a pod's application, of both its proxy's listeners, and of its resolver, by these names."""
    app, outbound, inbound, resolver = names
    proxy, is_tproxy = config.ids, config.policy.mode == "TPROXY"
    everywhere = ("0.0.0.0", "::")
    tcp, udp = _applications(app).values()
    for who, port in ((outbound, 15001), (inbound, 15006)):
        tcp += [[who, address, port, *proxy, is_tproxy] for address in everywhere] * config.workers
    tcp += [[resolver, address, 15053, *proxy, False] for address in ("127.0.0.1", "::1")]
    udp += [[resolver, address, 15053, *proxy] for address in ("127.0.0.1", "::1")]
    return {"tcp": tcp, "udp": udp}


def _applications(who: str, *taken: int) -> dict[str, Any]:
    """Of an application, on all ports but those that are taken."""
    everywhere = ("0.0.0.0", "::")
    ports = [port for port in _APPS if port not in taken]
    return {
        "tcp": [[who, address, port, 1000, 1000, False] for port in ports for address in everywhere],
        "udp": [[who, address, port, 1000, 1000] for port in (53, 80) for address in everywhere],
    }


def _ztunnels(outbound: str, inbound: str, resolver: str) -> dict[str, Any]:
    """Of ztunnel's listeners in a pod, by these names; who connects to 15008 gets the tunnel."""
    everywhere, own = ("0.0.0.0", "::"), (0, 0, True, 0x539)
    tcp = [[who, address, port, *own] for who, port in ((outbound, 15001), (inbound, 15006)) for address in everywhere]
    tcp += [["tunnel", address, 15008, *own] for address in everywhere]
    tcp += [[resolver, address, 15053, 0, 0, False, 0x539] for address in ("127.0.0.1", "::1")]
    udp = [[resolver, address, 15053, 0, 0, False, 0x539] for address in ("127.0.0.1", "::1")]
    return {"tcp": tcp, "udp": udp}


def _servers(who: str) -> dict[str, Any]:
    everywhere = ("0.0.0.0", "::")
    return {
        "tcp": [[who, address, port, 0, 0, False] for port in _SERVERS for address in everywhere],
        "udp": [[who, address, port, 0, 0] for port in (53, 80) for address in everywhere],
    }
