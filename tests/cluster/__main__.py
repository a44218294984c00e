"""`make cluster`: a Kubernetes of two nodes on this machine, Istio and sidestep in it, and what a user sees."""

import os
import signal
import sys
import time
from contextlib import ExitStack

import click

from tests.cluster.builder import BIN, BuildFailed, build_all
from tests.cluster.checks import Check, of_nodes, of_plain_pods, run_all
from tests.cluster.cluster import LOGS, Cluster
from tests.cluster.components import components
from tests.cluster.host import CGROUPS, CommandFailed, DaemonEnded
from tests.cluster.mesh import Mesh
from tests.cluster.mesh_checks import CLIENT, FAR, NAMESPACE, NEAR, of_requests, of_sidecars
from tests.cluster.pods import PodName, Pods
from tests.cluster.sidestep import IMAGE, Sidestep
from tests.lab import images
from tests.lab.demo import exit_on_signals
from tests.lab.node import REPOSITORY

PLAIN = (PodName("plain", "one"), PodName("plain", "two"))


@click.command()
@click.option("--keep", is_flag=True, help="Leave the cluster running, and say how to use it.")
def cluster(keep: bool) -> None:
    """Build a cluster, run it, hold it against what is expected, take it down."""
    if os.geteuid() != 0:
        sys.exit("cluster: namespaces and cgroups need root")
    if not (CGROUPS / "unified").exists():
        sys.exit(f"cluster: {CGROUPS} has no `unified`; so far hosts are made of hybrid cgroups only")
    exit_on_signals()
    try:
        build_all(components(), say=say)
    except BuildFailed as error:
        sys.exit(f"cluster: {error}")
    try:
        good, of = run(keep)
    except (CommandFailed, DaemonEnded, TimeoutError) as error:
        then = "make cluster-down takes it down" if keep else f"its logs are in {LOGS}"
        sys.exit(f"cluster: {error}\ncluster: {then}")
    click.echo(f"cluster: {good} of {of} as expected")
    sys.exit(0 if good == of else 1)


def run(keep: bool) -> tuple[int, int]:
    """Bring a cluster up, hold it against what is expected, take it down; how much was so, of how much."""
    with ExitStack() as stack:
        made = stack.enter_context(Cluster())
        # once down is where it goes, a second Ctrl-C must not stop it halfway
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.SIG_IGN)
        if keep:
            made.keep()
            tell_how_to_use(made)
        return run_all(checks(made))


def checks(made: Cluster) -> list[Check]:
    """Bring everything up, and what is to be looked at then."""
    began = time.monotonic()

    def reached(what: str) -> None:
        say(f"{what} after {time.monotonic() - began:.0f} s")

    sidestep, mesh, pods = Sidestep(made), Mesh(made), Pods(made.control)
    made.start([*images.make_images(REPOSITORY / "build" / "images"), IMAGE])
    reached("two nodes are Ready")
    sidestep.install()
    reached("sidestep is Ready")
    mesh.install()
    reached("istiod is Ready")
    make_pods(made, mesh, pods)
    reached("all pods are Ready")
    found = of_nodes(made, sidestep) + of_plain_pods(pods, PLAIN[0], PLAIN)
    return found + of_sidecars(made.control, pods, sidestep) + of_requests(pods, PLAIN[0], mesh)


def make_pods(made: Cluster, mesh: Mesh, pods: Pods) -> None:
    """Two without sidecars and three with, of which two are on one node."""
    made.control.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": PLAIN[0].namespace}})
    mesh.make_namespace(NAMESPACE)
    here, there = made.nodes
    places = {PLAIN[0]: here, PLAIN[1]: there, CLIENT: here, NEAR: here, FAR: there}
    for pod, node in places.items():
        pods.make(pod, node.name)
    pods.wait_until_ready(*places)


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
