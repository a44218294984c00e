"""`make bench-cni`: a whole ADD through the shim beside what Istio's plugin makes iptables do, interleaved in one run.

Both sides get the same kind of namespace and start from the same process: the shim against a running agent, and
iptables-restore followed by ip6tables-restore with the rules Istio writes for a default pod. The real plugin starts a
50 MB process and asks the API server on top, which is left out here. Prints p50 and p99 of both, and their ratio.
"""

import json
import statistics
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tests.lab.chain import Attachment
from tests.lab.inside import enter_netns
from tests.lab.node import NETNS, Node, make_netns

Rounds = list[dict[str, list[float]]]  # of each round: side → seconds of each set-up
PORTS = (15020, 15021, 15090)


def rules(loopback: str, inbound_source: str) -> bytes:
    """The nat rules of a default pod, written from Istio's documented capture order; one text a family."""
    chains = ["ISTIO_INBOUND", "ISTIO_REDIRECT", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT"]
    lines = ["*nat", *(f"-N {chain}" for chain in chains)]
    lines += [
        "-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN",
        "-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001",
        "-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006",
        "-A PREROUTING -p tcp -j ISTIO_INBOUND",
        *(f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN" for port in PORTS),
        "-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT",
        "-A OUTPUT -j ISTIO_OUTPUT",
        *(f"-A ISTIO_OUTPUT -p {protocol} --dport 15020 -j RETURN" for protocol in ("tcp", "udp")),
        f"-A ISTIO_OUTPUT -o lo -s {inbound_source} -j RETURN",
    ]
    for owner in ("uid", "gid"):
        lines += [
            f"-A ISTIO_OUTPUT -o lo ! -d {loopback} -p tcp ! --dport 15008 -m owner --{owner}-owner 1337 "
            "-j ISTIO_IN_REDIRECT",
            f"-A ISTIO_OUTPUT -o lo -m owner ! --{owner}-owner 1337 -j RETURN",
            f"-A ISTIO_OUTPUT -m owner --{owner}-owner 1337 -j RETURN",
        ]
    lines += [f"-A ISTIO_OUTPUT -d {loopback} -j RETURN", "-A ISTIO_OUTPUT -j ISTIO_REDIRECT", "COMMIT", ""]
    return "\n".join(lines).encode()


SIDES = {
    "sidestep": "sidestep ADD",
    "starting": "  of which starting the shim",
    "iptables": "iptables + ip6tables-restore",
}
RULES4, RULES6 = rules("127.0.0.1/32", "127.0.0.6/32"), rules("::1/128", "::6/128")


@dataclass(frozen=True)
class Sandbox:
    """One namespace to set up, over and over."""

    node: Node
    plugin: dict[str, Any]
    config: bytes
    netns: Path

    def sidestep(self) -> float:
        """Seconds of one ADD; the DEL after it is not timed."""
        return _inside(self.node.netns, self._add_and_delete)

    def iptables(self) -> float:
        """Seconds of both restores; the flush after them is not timed."""
        return _inside(self.netns, self._restore_and_flush)

    def starting(self) -> float:
        """Seconds of the shim answering VERSION by itself: the part of an ADD that is starting a process."""
        environment = {"CNI_COMMAND": "VERSION"}
        return _inside(self.node.netns, lambda: _timed(lambda: self._shim(environment)))

    def _add_and_delete(self) -> float:
        attachment = Attachment(uuid.uuid4().hex, self.netns, {"K8S_POD_NAME": "mesh", "K8S_POD_NAMESPACE": "default"})
        seconds = _timed(lambda: self._shim(attachment.environment("ADD", "/opt/cni/bin")))
        self._shim(attachment.environment("DEL", "/opt/cni/bin"))
        return seconds

    def _restore_and_flush(self) -> float:
        def restore() -> None:
            _spawn(["iptables-restore", "--noflush"], RULES4)
            _spawn(["ip6tables-restore", "--noflush"], RULES6)

        seconds = _timed(restore)
        for tool in ("iptables", "ip6tables"):
            for action in ("-F", "-X"):
                _spawn([tool, "-t", "nat", action])
        return seconds

    def _shim(self, environment: dict[str, str]) -> None:
        _spawn([self.node.shim], self.config, env=environment)


def _spawn(argv: list[str | Path], stdin: bytes = b"", **options: Any) -> None:
    done = subprocess.run(argv, input=stdin, capture_output=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} exited with {done.returncode}: {(done.stdout + done.stderr).decode()}")


def _inside(netns: Path, work: Callable[[], float]) -> float:
    """Do a turn in a thread that has entered a namespace: what it starts is there, at no cost to either side."""
    outcome: list[float] = []

    def enter() -> None:
        with netns.open() as descriptor:
            enter_netns(descriptor.fileno())
        outcome.append(work())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return outcome[0]


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def report(parallel: int, rounds: Rounds, sides: Mapping[str, str], other: str) -> None:
    """One block of the table: pooled percentiles, and the spread of the rounds' own p50 ratios.

    `sides` are the titles of what was measured; the ratio is that of `sidestep` to `other`.
    """
    pooled = {side: [seconds for each in rounds for seconds in each[side]] for side in sides}
    click.echo(f"\n{parallel} in parallel, {len(pooled['sidestep'])} each")
    for side, name in sides.items():
        p50, p99 = (percentile(pooled[side], share) * 1e3 for share in (0.5, 0.99))
        click.echo(f"  {name:30}p50 {p50:7.2f} ms   p99 {p99:7.2f} ms")
    ratios = sorted(statistics.median(each["sidestep"]) / statistics.median(each[other]) for each in rounds)
    p99 = percentile(pooled["sidestep"], 0.99) / percentile(pooled[other], 0.99)
    spread = f"(rounds {ratios[0]:.2f}–{ratios[-1]:.2f})"
    click.echo(f"  {f'ratio ADD / {other}':30}p50 {statistics.median(ratios):.2f} {spread}   p99 {p99:.2f}")


def compared(rounds: int, each: int) -> Iterator[tuple[int, Rounds]]:
    """Seconds of every set-up by round and side, at 1 and at 16 in parallel."""
    with Node() as node:
        (node.pods_dir / "mesh.yaml").write_text(
            "kind: Pod\nmetadata:\n  name: mesh\n  annotations: {sidecar.istio.io/status: '{}'}\n"
            "spec:\n  containers:\n  - name: istio-proxy\n    args: [proxy, sidecar]\n"
            "    env: [{name: ISTIO_DUAL_STACK, value: 'true'}]\n"
        )
        sandboxes = [_sandbox(node, number) for number in range(16)]
        for parallel in (1, 16):
            with ThreadPoolExecutor(parallel) as runtime:

                def turn(side: str, runtime: ThreadPoolExecutor = runtime, parallel: int = parallel) -> list[float]:
                    waves = [sandboxes[:parallel]] * (each // parallel)
                    return [s for wave in waves for s in runtime.map(lambda each: getattr(each, side)(), wave)]

                for side in SIDES:  # warm
                    turn(side)
                yield parallel, [{side: turn(side) for side in SIDES} for _ in range(rounds)]


@click.command()
@click.option("--rounds", default=10, show_default=True, help="Times both sides take turns.")
@click.option("--each", default=32, show_default=True, help="Set-ups a side and round.")
def bench(rounds: int, each: int) -> None:
    """Compare a whole ADD with Istio's iptables rules, at 1 and at 16 in parallel."""
    for parallel, found in compared(rounds, each):
        report(parallel, found, SIDES, "iptables")


def _sandbox(node: Node, number: int) -> Sandbox:
    netns = NETNS / f"sidestep-{node.id}-{number}"
    make_netns(netns)
    for command in (
        ["link", "add", "eth0", "type", "bridge"],
        ["addr", "add", f"10.0.0.{number + 1}/24", "dev", "eth0"],
        ["addr", "add", f"fd00::{number + 1}/64", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
    ):
        subprocess.run(["ip", "-n", netns.name, *command], check=True)
    plugin = node.conflist()["plugins"][-1]
    previous = {"cniVersion": "1.0.0", "interfaces": [], "ips": [{"address": f"10.0.0.{number + 1}/24"}]}
    cgroup = node.kubepods / "burstable" / f"pod{number}"
    cgroup.mkdir(parents=True, exist_ok=True)
    said = {"runtimeConfig": {"cgroupPath": f"/{cgroup.relative_to(node.cgroup_root)}"}}  # as containerd 1.7 does
    config = {**plugin, **said, "name": "bench", "cniVersion": "1.0.0", "prevResult": previous}
    return Sandbox(node, plugin, json.dumps(config).encode(), netns)


if __name__ == "__main__":
    bench()
