"""`make cluster`: a Kubernetes of two nodes on this machine, Istio and sidestep in it, and what a user sees."""

import signal
import sys
import time
from contextlib import ExitStack

import click

from tests.cluster import shape
from tests.cluster.bed import Bed
from tests.cluster.builder import BIN, BuildFailed, build_all
from tests.cluster.cluster import LOGS, Cluster
from tests.cluster.components import components
from tests.cluster.host import CommandFailed, DaemonEnded, lacking
from tests.cluster.scenario import Scenario, select
from tests.cluster.scenario import run as run_scenarios
from tests.cluster.scenarios import SCENARIOS
from tests.lab.demo import exit_on_signals


@click.command()
@click.option("--keep", is_flag=True, help="Leave the cluster running, and say how to use it.")
@click.option("--only", metavar="PATTERN", default="*", help="Run the scenarios whose names fit, as in a shell: 'li*'.")
def cluster(keep: bool, only: str) -> None:
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
        good, of = run(scenarios, keep)
    except (CommandFailed, DaemonEnded, TimeoutError) as error:
        then = "make cluster-down takes it down" if keep else f"its logs are in {LOGS}"
        sys.exit(f"cluster: {error}\ncluster: {then}")
    click.echo(f"cluster: {good} of {of} as expected")
    sys.exit(0 if good == of else 1)


def run(scenarios: list[Scenario], keep: bool) -> tuple[int, int]:
    """Bring a cluster up, run the scenarios, take it down; how much was as expected, of how much."""
    with ExitStack() as stack:
        made = stack.enter_context(Cluster())
        # once down is where it goes, a second Ctrl-C must not stop it halfway
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.SIG_IGN)
        if keep:
            made.keep()
            tell_how_to_use(made)
        return run_scenarios(scenarios, bring_up(made))


def bring_up(made: Cluster) -> Bed:
    """Everything that each scenario takes for granted."""
    began = time.monotonic()

    def reached(what: str) -> None:
        say(f"{what} after {time.monotonic() - began:.0f} s")

    bed = Bed.of(made)
    bed.start_nodes()
    reached("two nodes are Ready")
    for line in bed.releases():
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
