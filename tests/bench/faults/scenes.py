"""The reports, built: what is set in the pod's namespace, what runs there, and what one round counts.

Every setting is one of the pod's own network namespace.
"""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.faults.table import Fault, NotRun
from tests.datapath.wires import PROXY, Namespace, Wire
from tests.lab.inside import PYTHON

_HERE = Path(__file__).parent
_EACH = 8  # half-closed connections of each kind
_SAID = 1000  # bytes, in client.py and server.py
_TIMEOUT, _WAIT = 2, 4  # seconds: when conntrack forgets, and when the connection is used again
_PORTS = 64  # ephemeral ports of the pod
_PAIRS = 32
_RELAYED = 9090  # where the server outside of the mesh listens


@dataclass(frozen=True)
class Scene:
    """One or more figures of the same connections."""

    faults: tuple[Fault, ...]
    settings: Mapping[str, str]  # below /proc/sys/net of the pod's namespace
    start: Callable[[Wire], None]  # what runs
    count: Callable[[Wire, int], tuple[int, ...]]  # one round, by number; a count for each fault


def prepare(scene: Scene, wire: Wire) -> None:
    """Set and start in the pod and outside what the scene needs."""
    commands = "; ".join(f"echo '{value}' > /proc/sys/net/{name}" for name, value in scene.settings.items())
    subprocess.run(["nsenter", f"--net={wire.pod.path}", "sh", "-ec", commands or ":"], check=True)
    scene.start(wire)


def _script(name: str, *args: object) -> list[str]:
    """A stand-in's command; it comes in as text because the checkout may be where the pod's users cannot go."""
    return [*PYTHON, (_HERE / name).read_text(), *map(str, args)]


def _client(place: Namespace, *args: object) -> Any:
    """Run one of the clients and return what it saw."""
    return place.python((_HERE / "client.py").read_text(), *args)


def _start_halves(wire: Wire) -> None:
    wire.pod.start(_script("proxy.py", 15001, _RELAYED), PROXY, PROXY)
    wire.peer.start(_script("server.py", _RELAYED, _WAIT), 0, 0)


def _arrived(wire: Wire) -> dict[str, int]:
    server = wire.peer.started[0]
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write("\n")
    server.stdin.flush()
    counts: dict[str, int] = json.loads(server.stdout.readline())
    return counts


def _count_halves(wire: Wire, number: int) -> tuple[int, ...]:
    _arrived(wire)  # what rounds before have left
    seen = _client(wire.pod, "halves", wire.peer.ip4, _RELAYED, _EACH, _WAIT)
    arrived = _arrived(wire)
    later: int = _client(wire.pod, "again", wire.peer.ip4, _RELAYED, *seen["ports"])
    return arrived["ends"], arrived["bytes"], seen["heard"], later


def _start_outbound(wire: Wire) -> None:
    wire.pod.start(_script("proxy.py", 15001, 0), PROXY, PROXY)


def _count_burst(wire: Wire, number: int) -> tuple[int, ...]:
    time.sleep(2)  # Linux takes a source port in TIME_WAIT again after one second at the earliest
    return (_client(wire.pod, "burst", wire.peer.ip4, 9091, _PORTS),)


def _start_both(wire: Wire) -> None:
    _start_outbound(wire)
    wire.pod.start(_script("proxy.py", 15006, 0), PROXY, PROXY)


def _count_pairs(wire: Wire, number: int) -> tuple[int, ...]:
    base = 20_000 + 100 * number
    inbound = _client(wire.peer, "pairs", wire.pod.ip4, 5000, 5002, base, _PAIRS)
    outbound = _client(wire.pod, "pairs", wire.peer.ip4, 5000, 5002, base, _PAIRS)
    return inbound["right"], inbound["kept"], outbound["right"], outbound["kept"]


_HALVES = Scene(
    (
        Fault(
            "istio/istio#43297",
            "the server ends first; the application closes after conntrack's timeout, and its proxy is never told",
            "closes that reach the server",
            _EACH,
        ),
        Fault(
            "istio/istio#43297",
            "the same, but the application says more before it closes",
            "bytes that reach the server",
            _EACH * _SAID,
        ),
        Fault(
            "istio/istio#43297",
            "its cause the other way round: the application ends first; the server answers after conntrack's timeout",
            "bytes that reach the application",
            _EACH * _SAID,
        ),
        Fault(
            "istio/istio#43301",
            "a new connection from the source port of one that was left half-closed at the proxy times out",
            "connections answered within 0.5 s",
            _EACH,
        ),
    ),
    {
        "netfilter/nf_conntrack_tcp_timeout_close_wait": str(_TIMEOUT),
        "netfilter/nf_conntrack_tcp_timeout_fin_wait": str(_TIMEOUT),
    },
    _start_halves,
    _count_halves,
)
_BURST = Scene(
    (
        Fault(
            "istio/istio#51210",
            "short connections to one destination use up the source ports, which stay in TIME_WAIT",
            f"connections answered, {_PORTS} at a time with {_PORTS} ports",
            _PORTS,
        ),
    ),
    {"ipv4/ip_local_port_range": f"40000 {40000 + _PORTS - 1}"},
    _start_outbound,
    _count_burst,
)
_COLLISIONS = Scene(
    (
        Fault(
            "istio/istio#38982",
            "a client outside connects to two ports of the pod from one source port; the second SYN gets no answer",
            "connections answered for the right port",
            2 * _PAIRS,
        ),
        Fault(
            "istio/istio#38982",
            "the same",
            "connections in which the proxy sees the client's own port",
            2 * _PAIRS,
        ),
        Fault(
            "istio/istio#38982",
            "the same outbound: the application connects to two ports from one source port",
            "connections answered for the right port",
            2 * _PAIRS,
        ),
        Fault(
            "istio/istio#38982",
            "the same outbound",
            "connections in which the proxy sees the application's own port",
            2 * _PAIRS,
        ),
    ),
    {},
    _start_both,
    _count_pairs,
)
SCENES = (_HALVES, _BURST, _COLLISIONS)
LEFT_OUT = (
    NotRun(
        "nf_conntrack: table full",
        "new connections are dropped when conntrack's table is full",
        "how large the table may grow is a setting of the whole machine, not of a pod's namespace",
    ),
)
