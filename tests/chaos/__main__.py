"""`make chaos`: things are taken away at random while plain clients ask captured ports, both ways and in both families.

Every answer must have come through the proxy, or status must have said in the same second that it would not. Exits with
1 if one did not and nobody said so.
"""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import yaml

from bpf.errors import SidestepError
from bpf.pins import Pins
from installer.commands.status.status_document import status_of
from tests.chaos.damage import Damage
from tests.chaos.ledger import Ledger, Look
from tests.lab.inside import PYTHON
from tests.lab.node import Node
from tests.lab.pod import APP_PORT, Pod

ASKING = Path(__file__).with_name("asking.py").read_text()
_LOOK_SECONDS = 0.2  # between two looks at the status
_ASK_SECONDS = 0.02
_QUIET_SECONDS = 1.0  # at the end, in which nothing is taken away any more


@contextmanager
def asked(pod: Pod, direction: str, hosts: tuple[Any, ...], ledger: Ledger) -> Iterator[None]:
    """A client in a pod asks until the with block ends."""
    targets = [str(each) for host in hosts for each in (host, APP_PORT)]
    client = pod.popen([*PYTHON, ASKING, str(_ASK_SECONDS), *targets], stdout=subprocess.PIPE, text=True)

    def read() -> None:
        for line in client.stdout:
            ledger.answers.append((direction, json.loads(line)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        client.kill()
        client.wait()
        reader.join()


@contextmanager
def looked(pins: Pins, ledger: Ledger) -> Iterator[None]:
    """Look at the status until the with block ends, as `sidestep status` does."""
    stopping = threading.Event()

    def look() -> None:
        while not stopping.wait(_LOOK_SECONDS):
            began = time.monotonic()
            ledger.looks.append(Look(began, time.monotonic(), admits(pins)))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        stopping.set()
        watcher.join()


def admits(pins: Pins) -> bool:
    """Whether status says that traffic of a pod is not covered, or that it does not know."""
    try:
        document = status_of(pins)
    except SidestepError:
        return True
    return not document["attached"] or bool(document["open_pods"] or document["pods_with_strays"])


def play(seconds: float, seed: int) -> Ledger:
    """One node, one mesh pod and a client beside it, and damage for some time."""
    chance, ledger = random.Random(seed), Ledger()
    with Node() as node, ExitStack() as running:
        alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
        _say_that_it_runs(node, alpha)
        running.enter_context(looked(Pins(node.bpffs), ledger))
        running.enter_context(asked(gamma, "in", alpha.ips, ledger))
        running.enter_context(asked(alpha, "out", gamma.ips, ledger))
        damage, until = Damage(node, alpha, chance), time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            what, restore = damage.strike()
            ledger.strikes.append((began, what))
            click.echo(f"{began:.1f} {what}", err=True)
            time.sleep(chance.uniform(0.2, 1.5))
            restore()
            time.sleep(chance.uniform(0.0, 2.0))
        time.sleep(_QUIET_SECONDS)
    return ledger


def _say_that_it_runs(node: Node, pod: Pod) -> None:
    """As the API server would. If an agent dies while nothing is pinned, the next one has to enrol the pod again."""
    status = {"phase": "Running", "podIP": str(pod.ip4)}
    (node.pods_dir / f"{pod.name}.yaml").write_text(yaml.safe_dump(pod.manifest() | {"status": status}))


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long things are taken away.")
@click.option("--seed", default=None, type=int, help="Takes the same things again.")
def chaos(seconds: float, seed: int | None) -> None:
    """Take away links, pins, listeners, cgroups and agents, and see where connections go."""
    seed = random.randrange(1000) if seed is None else seed
    click.echo(f"chaos: {seconds:.0f} seconds, seed {seed}")
    fates, unsaid = play(seconds, seed).judge()
    for where, count in unsaid.items():
        click.echo(f"in the clear, unsaid: {count} {where}")
    click.echo(
        f"chaos: {fates.total()} asked, {fates['proxy']} through the proxy, {fates['refused']} refused, "
        f"{fates['said']} in the clear and said so, {fates['unsaid']} in the clear unsaid"
    )
    sys.exit(1 if unsaid or not fates["proxy"] else 0)


if __name__ == "__main__":
    chaos()
