"""A mesh pod's surroundings for connections by the hundred: everybody who may answer, and who connects, all resident.

The scripts are those of tests/conformance; here they meet Pods that change under them.
"""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal

from cni.policy.annotations import CapturePolicy
from cni.policy.decision import Inbound, IPAddress, Outbound
from tests import conformance
from tests.datapath.wires import Namespace, Wire, ip_command
from tests.lab.inside import PYTHON

# every port that something in the pod listens on; the proxy's own two are its own
PORTS = (22, 53, 80, 443, 5555, 8080, 15001, 15002, 15006, 15008, 15020, 15021, 15090, 65535)
UDP_PORTS = (53, 80)
# addresses of the peer beside those of the cable
OUTSIDE4, OUTSIDE6 = IPv4Address("203.0.113.9"), IPv6Address("2001:db8:9::9")
# where everything ends that leaves the pod, whatever its address and port
_SINK = 7777
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Case:
    """One connection, with what of it the decision does not look at."""

    asked: Outbound | Inbound
    family: Literal["4", "6", "mapped"]
    destination: IPAddress
    connector: tuple[int, int] = (0, 0)
    connected: bool = True  # or a datagram that says itself where it goes

    @property
    def is_ipv6(self) -> bool:
        return self.family == "6"

    def request(self) -> dict[str, Any]:
        """As conformance/prober.py takes it."""
        asked, prefix = self.asked, "::ffff:" if self.family == "mapped" else ""
        bound = "" if asked.source is None else f"{prefix}{asked.source}"
        return {
            "family": self.family,
            "destinations": [[f"{prefix}{self.destination}", asked.port]],
            "opener": [asked.uid, asked.gid] if isinstance(asked, Outbound) else [0, 0],
            "connector": self.connector,
            "protocol": asked.protocol if isinstance(asked, Outbound) else "tcp",
            "how": "connected" if self.connected else "unconnected",
            "source": bound,
            "source_port": 0,
            "device": "",
            "mark": asked.mark if isinstance(asked, Outbound) else 0,
            "held": False,
        }


class Surroundings:
    """What listens, and who connects. Everything but the proxy stays from one Pod to the next."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        pod, peer = wire.pod.path.name, wire.peer.path.name
        for version, gateway, outside in ((4, wire.peer.ip4, OUTSIDE4), (6, wire.peer.ip6, OUTSIDE6)):
            ip_command(f"-{version}", "-n", pod, "route", "replace", "default", "via", gateway)
            ip_command("-n", peer, "address", "add", outside, "dev", "lo")
            tool = "iptables" if version == 4 else "ip6tables"
            for protocol in ("tcp", "udp"):
                rule = f"{tool} -t nat -A PREROUTING -i eth0 -p {protocol} -j REDIRECT --to-ports {_SINK}"
                subprocess.run(["nsenter", f"--net={wire.peer.path}", *rule.split()], check=True)
        _serve(wire.peer, tcp=_everywhere("remote", [_SINK], (0, 0), False), udp=_everywhere("remote", [_SINK], (0, 0)))
        apps = [port for port in PORTS if port not in (15001, 15006)]
        _serve(
            wire.pod, tcp=_everywhere("app", apps, (1000, 1000), False), udp=_everywhere("app", UDP_PORTS, (1000, 1000))
        )
        self._inside, self._outside = (end.start(_script("prober.py"), 0) for end in (wire.pod, wire.peer))
        self._proxy: subprocess.Popen[str] | None = None

    def enrol(self, policy: CapturePolicy, fresh: bool) -> None:
        """Enrol the pod, `fresh` or over what it was, and start its proxy anew as whoever it runs as now."""
        if self._proxy:
            self._wire.pod.end(self._proxy)
        if fresh:
            self._wire.kernel.enrolments.remove(self._wire.sandbox.cookie)
        self._wire.look_again()
        self._wire.enrol(policy)
        who, transparent = (policy.proxy_uid, policy.proxy_gid), policy.mode == "TPROXY"
        tcp = _everywhere("E1", [15001], who, transparent) + _everywhere("E6", [15006], who, transparent)
        resolver = [["D", address, 15053, *who] for address in ("127.0.0.1", "::1")]
        self._proxy = _serve(self._wire.pod, tcp=tcp + [[*each, False] for each in resolver], udp=resolver)

    def try_all(self, cases: list[Case]) -> list[dict[str, Any]]:
        """What was seen of each connection."""
        seen: dict[int, dict[str, Any]] = {}
        for prober, kind in ((self._inside, Outbound), (self._outside, Inbound)):
            here = [number for number, case in enumerate(cases) if isinstance(case.asked, kind)]
            assert prober.stdin is not None and prober.stdout is not None
            prober.stdin.write(json.dumps([cases[number].request() for number in here]) + "\n")
            prober.stdin.flush()
            seen |= zip(here, json.loads(prober.stdout.readline()), strict=True)
        return [seen[number] for number in range(len(cases))]


def _script(name: str, *args: str) -> list[str]:
    return [*PYTHON, Path(conformance.__path__[0], name).read_text(), *args]


def _serve(where: Namespace, **listeners: list[list[Any]]) -> "subprocess.Popen[str]":
    return where.start(_script("standins.py", json.dumps(listeners)), 0)


def _everywhere(who: str, ports: Iterable[int], ids: tuple[int, int], *more: bool) -> list[list[Any]]:
    """Listeners on all addresses of both families."""
    return [[who, address, port, *ids, *more] for port in ports for address in _EVERYWHERE]
