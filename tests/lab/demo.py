"""`make demo`: two mesh pods and a plain one, real HTTP between them, and who got each connection."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_network
from types import FrameType

import click

from tests.lab.curl import Reply, curl, host
from tests.lab.envoy import PROXY_ID, Connection
from tests.lab.node import Node
from tests.lab.pod import APP_PORT, Pod


@dataclass(frozen=True)
class Row:
    """One connection as it should be and as it was."""

    origin: str
    target: str
    received: str
    original: str
    source: str
    peer: str
    wrong: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """What is printed."""
        verdict = "as expected" if not self.wrong else "NOT as expected: " + "; ".join(self.wrong)
        return (self.origin, self.target, self.received, self.original, self.source, self.peer, verdict)


HEADER = ("from", "to", "received by", "original destination", "source the proxy saw", "getpeername", "verdict")
# seconds: a few of the access log's flush intervals (tests/lab/envoy.py)
_LATE_LINE = 0.04
WIDTHS = (22, 30, 36, 24, 20, 24, 0)


@dataclass(frozen=True)
class Probe:
    """One connection to make: who makes it, to whom, and which proxies it should pass."""

    origin: str
    request: Callable[[], Reply]
    target: Pod
    ip: object
    source: str  # the address the first proxy should see
    path: tuple[tuple[Pod, str], ...]
    app_peer: str | None = None


def run(probe: Probe, meshed: tuple[Pod, ...]) -> Row:
    """Make the connection and hold everything seen against what should have been."""
    for pod in meshed:
        pod.envoy.connections()
    reply = probe.request()
    wanted = f"{host(probe.ip)}:{APP_PORT}"
    seen: list[tuple[Pod, Connection]] = []
    _wait_for_logs(meshed, seen, len(probe.path))
    # a proxy that should not have been passed may still be writing its line
    time.sleep(_LATE_LINE)
    _collect(meshed, seen)
    passed = [(pod.name, each.listener) for pod, each in seen]
    expected = [(pod.name, listener) for pod, listener in probe.path]
    wrong = []
    if sorted(passed) != sorted(expected):
        wrong.append(f"passed {passed or 'no proxy'}")
    if reply.pod != probe.target.name:
        wrong.append(f"answered by {reply.pod or reply.error}")
    if reply.peer != wanted:
        wrong.append(f"getpeername {reply.peer}")
    if any(each.original != wanted for _, each in seen):
        wrong.append("original destination")
    if any(each.source.rpartition(":")[0].strip("[]") != probe.source for _, each in seen):
        wrong.append("source")
    if probe.app_peer and reply.pod and reply.body["peer"] != probe.app_peer:
        wrong.append(f"the application saw {reply.body['peer']}")
    first = next((each for pod, each in seen if (pod, each.listener) == probe.path[0]), None) if probe.path else None
    hops = [
        f"{name}/{15001 if listener == 'outbound' else 15006}"
        for name, listener in expected
        if (name, listener) in passed
    ]
    return Row(
        probe.origin,
        f"{probe.target.name} {wanted}",
        " → ".join([*hops, f"{reply.pod} app" if reply.pod else "nobody"]),
        first.original if first else "-",
        first.source.rpartition(":")[0] if first else "-",
        reply.peer,
        tuple(wrong),
    )


def _collect(meshed: tuple[Pod, ...], seen: list[tuple[Pod, Connection]]) -> None:
    for pod in meshed:
        seen.extend((pod, each) for each in pod.envoy.connections())


def _wait_for_logs(meshed: tuple[Pod, ...], seen: list[tuple[Pod, Connection]], wanted: int) -> None:
    """Collect until the expected lines are there, or two seconds: the table then says what is missing."""
    for _ in range(200):
        _collect(meshed, seen)
        if len(seen) >= wanted:
            return
        time.sleep(0.01)


def probes(node: Node, alpha: Pod, beta: Pod, gamma: Pod) -> list[Probe]:
    """Every connection of the demo, over both families."""
    found = []
    for version in (4, 6):
        a, b, c = (getattr(pod, f"ip{version}") for pod in (alpha, beta, gamma))
        gateway = _gateway(node, version)
        inbound_source = "127.0.0.6" if version == 4 else "::6"

        def host_curl(ip: object = b) -> Reply:
            return curl(node.netns, None, f"http://{host(ip)}:{APP_PORT}/", 0, 0)

        def from_pod(pod: Pod, ip: object, uid: int = 1000, *options: str) -> Callable[[], Reply]:
            return lambda: pod.curl(ip, uid=uid, options=options)

        out, into = (alpha, "outbound"), (beta, "inbound")
        found += [
            Probe("alpha app", from_pod(alpha, b), beta, b, str(a), (out, into), inbound_source),
            Probe("alpha app", from_pod(alpha, c), gamma, c, str(a), (out,), str(a)),
            Probe("gamma app (plain)", from_pod(gamma, b), beta, b, str(c), (into,), inbound_source),
            Probe("node (no mesh)", host_curl, beta, b, gateway, (into,), inbound_source),
            Probe("gamma app (plain)", from_pod(gamma, c), gamma, c, "", (), str(c)),
            Probe("alpha app, to itself", from_pod(alpha, a), alpha, a, "", (), str(a)),
            Probe("alpha proxy", from_pod(alpha, c, PROXY_ID), gamma, c, "", (), str(a)),
            Probe(
                "alpha proxy, to itself",
                from_pod(alpha, a, PROXY_ID),
                alpha,
                a,
                str(a),
                ((alpha, "inbound"),),
                inbound_source,
            ),
            Probe(
                f"alpha proxy, {inbound_source}",
                from_pod(alpha, a, PROXY_ID, "--interface", f"host!{inbound_source}"),
                alpha,
                a,
                "",
                (),
                inbound_source,
            ),
        ]
    return found


def _gateway(node: Node, version: int) -> str:
    """The bridge's address: what connections from the node come from."""
    ranges = node.conflist()["plugins"][0]["ipam"]["ranges"]
    return str(ip_network(ranges[0 if version == 4 else 1][0]["subnet"])[1])


def progress(text: str) -> None:
    """What is going on, beside the table."""
    click.echo(click.style(text, dim=True), err=True)


def line(cells: tuple[str, ...]) -> str:
    """One aligned line."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


@click.command()
@click.option("--keep", is_flag=True, help="Leave the mesh up and say how to look around.")
def demo(keep: bool) -> None:
    """Build a small mesh, make every kind of connection, say who got it; leave nothing behind."""
    exit_on_signals()
    with ExitStack() as stack:
        node = stack.enter_context(Node(keep=keep))
        # once down is where it goes, a second Ctrl-C must not stop it halfway
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.SIG_IGN)
        progress(f"demo: node {node.id}: programs attached at {node.kubepods}")
        pods = []
        for name, mesh in (("alpha", True), ("beta", True), ("gamma", False)):
            pods.append(node.pod(name, mesh))
            kind = "mesh pod with Envoy" if mesh else "plain pod"
            progress(f"demo: {kind} {name}: {pods[-1].ip4} {pods[-1].ip6}")
        alpha, beta, gamma = pods
        click.echo(line(HEADER))
        rows = []
        for probe in probes(node, alpha, beta, gamma):
            rows.append(run(probe, (alpha, beta)))
            click.echo(line(rows[-1].cells()))
        good = sum(not row.wrong for row in rows)
        if keep:
            _explain(node, alpha)
        click.echo(f"demo: {good} of {len(rows)} as expected")
    sys.exit(0 if good == len(rows) else 1)


def exit_on_signals() -> None:
    """Ctrl-C and SIGTERM unwind this process; a child between fork and exec just goes on."""
    owner = os.getpid()

    def leave(number: int, _: FrameType | None) -> None:
        if os.getpid() == owner:
            sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def _explain(node: Node, alpha: Pod) -> None:
    """How to look around: an `export` with which every command works, then commands that show something."""
    settings = {
        "SIDESTEP_BPFFS": node.bpffs,
        "SIDESTEP_CGROUP": node.kubepods,
        "SIDESTEP_PODS": node.pods_dir,
        "CNI_AGENT_RUN_DIR": node.run_dir,
        "SIDESTEP_HEALTH_PORT": node.agent.port("health"),
        "MONITORING_PORT": node.agent.port("metrics"),
    }
    click.echo("\nThe mesh is still up. As root, in this folder:\n")
    click.echo(f"  export {' '.join(f'{name}={value}' for name, value in settings.items())}\n")
    inside = f"nsenter --net={alpha.netns} setpriv --reuid 1000 --regid 1000 --clear-groups"
    request = f"curl -s http://{node.pods['beta'].ip4}:{APP_PORT}/"
    for what, command in (
        # its shell joins alpha's cgroup first: nsenter alone makes a stray process, which nothing captures
        ("a request from alpha", f"sh -c 'echo $$ > {alpha.cgroup}/cgroup.procs && exec {inside} {request}'"),
        ("is all well?", "./sidestep status"),
        ("the pods", "./sidestep pods"),
        ("the whole way", f"./sidestep explain alpha beta:{APP_PORT} --try"),
        ("what happens", "./sidestep trace --follow"),
        ("rates", "./sidestep top"),
        ("a page about it", "./sidestep report --output-file node.html"),
        ("Envoy's connections", f"tail -f {alpha.envoy.log}"),
        ("the agent's log", f"tail -f {node.agent.log}"),
        ("remove it", f"{sys.executable} -m tests.lab.clean {node.id}"),
    ):
        click.echo(f"  {what + ':':22}{command}")
    click.echo("")


if __name__ == "__main__":
    demo()
