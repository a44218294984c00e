"""What a process outside of the mesh pays for attached programs: at kubepods, above everything, or not at all.

The process is in a sibling of kubepods, as a node's own services are. Where its cgroup is below the one the programs
are attached at (the cgroup2 root, when nothing better is found) they run for it too, and return at once. The root
proper is everybody's, so a directory above both stands in for it. All three states take turns in every round.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from bpf.attachment import attach_programs, detach_programs
from bpf.pins import Pins
from tests.bench.mesh.blocks import Block, judged
from tests.bench.mesh.ratios import Spread, spread
from tests.datapath.wires import scratch_pins
from tests.lab.inside import popen
from tests.lab.node import NETNS, make_netns

CALLS = {"getsockopt": 200_000, "connect-udp": 50_000, "connect-tcp": 4_000, "sendmsg": 50_000, "socket": 20_000}
JUDGED = ("getsockopt", "connect-udp", "connect-tcp")
STATES = ("detached", "kubepods", "root")
_SOURCE = Path(__file__).with_name("syscalls.c")


@contextmanager
def outsider(cgroup: Path) -> Iterator["subprocess.Popen[str]"]:
    """A resident process in a namespace and a cgroup of its own, ready for orders."""
    netns = NETNS / f"{cgroup.parent.name}-outside"
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "syscalls"
        subprocess.run(["gcc", "-O2", "-o", program, _SOURCE], check=True)
        make_netns(netns)
        try:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process: subprocess.Popen[str] = popen(netns, cgroup, [program], 0, 0, **pipes)
            with process:
                try:
                    assert process.stdout is not None
                    if process.stdout.readline() != "ready\n":
                        raise RuntimeError("the process outside of the mesh does not start")
                    yield process
                finally:
                    process.kill()
        finally:
            subprocess.run(["ip", "netns", "del", netns.name], check=True)


def measure(rounds: int) -> dict[str, dict[str, Spread]]:
    """Ratios to the detached state by call and state; the first round warms up."""
    found: dict[tuple[str, str], list[float]] = {(call, state): [] for call in CALLS for state in STATES}
    with scratch_pins() as (pins, top):
        kubepods, elsewhere = top / "kubepods", top / "elsewhere"
        for each in (kubepods, elsewhere):
            each.mkdir()
        try:
            with outsider(elsewhere) as process:
                for number in range(rounds + 1):
                    for state in STATES[number % 3 :] + STATES[: number % 3]:
                        _bring_about(state, pins, {"kubepods": kubepods, "root": top})
                        for call, nanoseconds in _times(process).items():
                            found[call, state] += [nanoseconds] if number else []
        finally:
            detach_programs(pins)
            for each in (kubepods, elsewhere):
                each.rmdir()
    return {call: {state: _ratios(found, call, state) for state in STATES[1:]} for call in CALLS}


def block(rounds: int) -> Block:
    """The table, aims beside the figures."""
    found = measure(rounds)
    rows = []
    for call, states in found.items():
        aim = ["≤ 1.0", judged(states["kubepods"], 1.0, True)] if call in JUDGED else ["–", "–"]
        rows.append([call, str(states["kubepods"]), *aim, str(states["root"])])
    note = (
        "Time of one call, programs attached against not. Where others have programs on any cgroup of the machine the\n"
        "kernel's shortcut for having none is off in all three states. connect-udp is the hook and little else."
    )
    head = ["call of a process outside of the mesh", "attached at kubepods", "aim", "", "attached above it (no aim)"]
    data = {call: {state: asdict(each) for state, each in states.items()} for call, states in found.items()}
    return Block("Tax on a process outside of the mesh", head, rows, note, data)


def _bring_about(state: str, pins: Pins, places: dict[str, Path]) -> None:
    detach_programs(pins)
    if state in places:
        attach_programs(pins, places[state])


def _times(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Nanoseconds of each call: the best of three goes, as others can only make it slower."""
    return {call: min(_time(process, call, count // 3) for _ in range(3)) for call, count in CALLS.items()}


def _time(process: "subprocess.Popen[str]", call: str, count: int) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{call} {count}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _ratios(found: dict[tuple[str, str], list[float]], call: str, state: str) -> Spread:
    pairs = zip(found[call, state], found[call, "detached"], strict=True)
    ratios = spread(ours / theirs for ours, theirs in pairs)
    assert ratios is not None
    return ratios


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Times the three states take turns.")
def bench(rounds: int) -> None:
    """Print the table."""
    click.echo(block(rounds).markdown())


if __name__ == "__main__":
    bench()
