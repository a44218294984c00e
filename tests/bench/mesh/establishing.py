"""What establishing a captured connection costs either end, without Envoys: connect(), accept(), SO_ORIGINAL_DST."""

import json
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.mesh.blocks import Block
from tests.bench.mesh.proxies import INBOUND, OUTBOUND
from tests.bench.mesh.ratios import Spread, spread
from tests.bench.mesh.scenarios import BASELINE, SCENARIOS, Way, bare_pods
from tests.lab.envoy import PROXY_ID
from tests.lab.inside import popen
from tests.lab.pod import APP_ID, APP_PORT, Pod

CALLS = ("connect", "accept", "getsockopt")
CYCLES = "cycles of both ends"
_SOURCE = Path(__file__).with_name("handshake.c")
_CONNECTIONS = 2000
_NOTE = """\
Medians of each round's connections, as ratios to iptables. No Envoy: one process connects and accepts, and
checks that the original destination is told. Without a mesh connect() goes to the same listener directly,
and getsockopt(SO_ORIGINAL_DST) fails.
"""
_COUNTED = "Cycles are the processor's, from socket() to close(), with the kernel's work on packets."
_UNCOUNTED = "This machine's processor counts no cycles for its guests, so there is no row of them."


@dataclass(frozen=True)
class Direction:
    """From an application to its own proxy, or from a pod's proxy to another pod's."""

    name: str
    client: Pod
    listener: Pod
    address: str
    port: int
    listening: int
    client_id: int
    original: int  # the port the accepting end has to be told; 0 where nobody knows one

    def argv(self, program: Path) -> list[str | Path]:
        """What is run."""
        where: list[str | Path] = [program, self.listener.netns, str(self.listening), self.client.netns]
        return [*where, self.address, str(self.port), str(self.client_id), str(_CONNECTIONS)]


WAYS = tuple(name for name, each in SCENARIOS.items() if each.way is not Way.UNIX)


def block(rounds: int, names: tuple[str, ...] = WAYS) -> Block:
    """The table: sidestep and no capture, as ratios to iptables, which has to be among them."""
    found: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "handshake"
        subprocess.run(["gcc", "-O2", "-o", program, _SOURCE], check=True)
        ways = {name: _directions(name, *bare_pods(stack, SCENARIOS[name])) for name in names}
        for number in range(rounds + 1):  # the first round warms up
            for name in names[number % len(names) :] + names[: number % len(names)]:
                for direction in ways[name]:
                    for what, amount in _costs(direction, program).items():
                        found.setdefault((direction.name, what, name), []).extend([amount] if number else [])
    others = [name for name in names if name != BASELINE.name]
    ratios = {key: _ratio(found, *key) for key in found if key[2] in others}
    rows = [
        [f"{direction}, {call}", *(str(ratios[direction, call, name]) for name in others)]
        for direction, call in dict.fromkeys((direction, call) for direction, call, _ in found)
    ]
    note = _NOTE + (_COUNTED if any(what == CYCLES for _, what, _ in found) else _UNCOUNTED)
    data = {" ".join(key): asdict(each) for key, each in ratios.items()}
    return Block("Establishing a connection", ["ratio to iptables", *others], rows, note, data)


def _directions(name: str, client: Pod, server: Pod) -> tuple[Direction, Direction]:
    remote = str(server.ip4)
    if SCENARIOS[name].way is Way.NOBODY:
        outbound = Direction("outbound", client, client, "127.0.0.1", OUTBOUND, OUTBOUND, APP_ID, 0)
        return outbound, Direction("inbound", client, server, remote, INBOUND, INBOUND, PROXY_ID, 0)
    outbound = Direction("outbound", client, client, remote, APP_PORT, OUTBOUND, APP_ID, APP_PORT)
    return outbound, Direction("inbound", client, server, remote, APP_PORT, INBOUND, PROXY_ID, APP_PORT)


def _costs(direction: Direction, program: Path) -> dict[str, float]:
    """Nanoseconds of each call, and cycles of a connection where the machine counts them.

    Raises RuntimeError where a connection was not captured as it should be.
    """
    pod = direction.client
    argv = direction.argv(program)
    process = popen(pod.netns, pod.cgroup, argv, 0, 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, words = process.communicate(timeout=60)
    if process.returncode != 0:
        raise RuntimeError(f"{direction.name} in {pod.node.id}: {words}")
    seen = json.loads(out)
    if seen["original"] != direction.original:
        raise RuntimeError(f"{direction.name}: original port {seen['original']}, not {direction.original}")
    costs = {call: float(seen[call]) for call in CALLS}
    return costs if seen["cycles"] is None else costs | {CYCLES: float(seen["cycles"])}


def _ratio(found: dict[tuple[str, str, str], list[float]], direction: str, call: str, name: str) -> Spread:
    theirs = found[direction, call, BASELINE.name]
    ratios = spread(ours / base for ours, base in zip(found[direction, call, name], theirs, strict=True))
    assert ratios is not None
    return ratios
