"""`make soak`: many gigabytes from pod to pod through both proxies while the node's level keeps changing."""

import sys
import time

import click

from tests.lab.demo import exit_on_signals, progress
from tests.lab.levels import changing, redirected_bytes
from tests.lab.node import Node
from tests.lab.traffic.program import Load, calling, serving


@click.command()
@click.option("--bytes", "total", default=1e10, help="How much, both ways together.", show_default=True)
@click.option("--seconds", default=1800, help="When to end without having reached it.", show_default=True)
@click.option("--seed", default=1, help="Same seed, same sizes and pauses.", show_default=True)
@click.option("--parallel", default=64, help="Connections at a time.", show_default=True)
@click.option("--mean", default=8_000_000, help="Bytes of a connection each way on average.", show_default=True)
@click.option("--pause", default=200, help="Mean microseconds of the usual pause.", show_default=True)
@click.option("--flip", default=0.2, help="Seconds between changes of the level.", show_default=True)
def soak(total: float, seconds: int, seed: int, parallel: int, mean: int, pause: int, flip: float) -> None:
    """Every byte must arrive in its place; exit status 1 says that one did not, and which."""
    exit_on_signals()
    load = Load(seconds, int(total), 0, parallel, mean, pause, seed)
    node = Node()
    node.agent.options = ["--acceleration", "off"]
    with node:
        alpha, beta = (node.pod(name, annotations={"sidestep.io/acceleration": "full"}) for name in ("alpha", "beta"))
        progress(f"soak: {load}, from {alpha.ip4} to {beta.ip4}")
        started = time.monotonic()
        with serving(beta) as server, changing(node, flip) as levels, calling(alpha, beta.ip4, load) as client:
            try:
                asked = client.finish(seconds + 120)
                answered = server.finish()
            except AssertionError as wrong:
                sys.exit(f"soak: after {time.monotonic() - started:.0f} s: {wrong}")
        redirected = redirected_bytes(alpha) + redirected_bytes(beta)
    if (asked.sent, asked.received, asked.finished) != (answered.received, answered.sent, answered.finished):
        sys.exit(f"soak: the ends disagree: {asked} {answered}")
    moved = asked.sent + asked.received
    if moved < total:
        sys.exit(f"soak: {moved} of {total:.0f} bytes in {seconds} s, each in its place: too few to say so")
    if not redirected:
        sys.exit(f"soak: nothing was redirected of {moved} bytes")
    click.echo(
        f"soak: {asked.finished} connections, {moved} bytes in {asked.seconds:.0f} s, each in its"
        f" place; {redirected} bytes were redirected in the three hops; the level was changed {len(levels)} times;"
        f" {asked.again + answered.again} blocking calls came back with EAGAIN"
    )


if __name__ == "__main__":
    soak()
