"""`make cluster`: a Kubernetes of two nodes on this machine, Istio and sidestep in it, and what a user sees.

Two such clusters share the scenarios, because one alone waits half of the time.
"""

import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from string import ascii_uppercase

import click

from tests.cluster import shape
from tests.cluster.bed import Bed
from tests.cluster.builder import BIN, BuildFailed, build_all
from tests.cluster.cluster import LOGS, Cluster
from tests.cluster.components import components
from tests.cluster.host import CommandFailed, DaemonEnded, lacking
from tests.cluster.scenario import Scenario, select
from tests.cluster.scenarios import SCENARIOS
from tests.cluster.side_by_side import run_on
from tests.lab.demo import exit_on_signals

_CLUSTERS = 2


@click.command()
@click.option("--keep", is_flag=True, help="Leave the cluster running, and say how to use it.")
@click.option("--only", metavar="PATTERN", default="*", help="Run the scenarios whose names fit, as in a shell: 'li*'.")
@click.option("--clusters", type=click.IntRange(1), default=_CLUSTERS, help="How many may run side by side.")
def cluster(keep: bool, only: str, clusters: int) -> None:
    """Build a cluster, run it, hold it against what is expected, take it down."""
    chosen = f"{shape.cgroups()} cgroups, made by {shape.driver()}; the network is {shape.network()}"
    try:
        scenarios = select(SCENARIOS, only)
    except LookupError as error:
        raise click.BadParameter(str(error), param_hint="--only") from None
    if wrong := lacking():
        sys.exit(f"cluster: {wrong}")
    say(chosen)
    exit_on_signals()
    try:
        build_all(components(), say=say)
    except BuildFailed as error:
        sys.exit(f"cluster: {error}")
    try:
        good, of = run(scenarios, keep, 1 if keep else min(clusters, len(scenarios)))
    except (CommandFailed, DaemonEnded, TimeoutError) as error:
        then = "make cluster-down takes it down" if keep else f"its logs are in {LOGS}"
        sys.exit(f"cluster: {error}\ncluster: {then}")
    click.echo(f"cluster: {good} of {of} as expected")
    sys.exit(0 if good == of else 1)


def run(scenarios: list[Scenario], keep: bool, count: int) -> tuple[int, int]:
    """Bring clusters up, run the scenarios, take them down; how much was as expected, of how much."""
    with ExitStack() as stack:
        made = [stack.enter_context(Cluster()) for _ in range(count)]
        # once down is where it goes, a second Ctrl-C must not stop it halfway
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.SIG_IGN)
        if keep:
            made[0].keep()
            tell_how_to_use(made[0])
        return run_on(list(zip(made, ascii_uppercase, strict=False)), scenarios, partial(bring_up, of=count))


def bring_up(place: tuple[Cluster, str], of: int) -> Bed:
    """Everything that each scenario takes for granted; of several clusters, each is told by its letter."""
    made, letter = place
    began = time.monotonic()

    def reached(what: str) -> None:
        say(f"{f'{letter}: ' if of > 1 else ''}{what} after {time.monotonic() - began:.0f} s")

    bed = Bed.of(made)
    bed.start_nodes()
    reached("two nodes are Ready")
    for line in bed.releases() if letter == ascii_uppercase[0] else ():
        say(line)
    bed.sidestep.install()
    reached("sidestep is Ready")
    bed.mesh.install()
    reached("istiod is Ready")
    bed.make_pods()
    reached("all pods are Ready")
    return bed


def tell_how_to_use(made: Cluster) -> None:
    """A command line that a user can paste."""
    netns, kubectl, kubeconfig = made.control.host.netns, BIN / "kubectl", made.control.kubeconfig
    say(f"kubectl is: nsenter --net={netns} {kubectl} --kubeconfig {kubeconfig}")
    say("make cluster-down takes it down")


def say(line: str) -> None:
    """One line of progress."""
    click.echo(f"cluster: {line}")


if __name__ == "__main__":
    cluster()
