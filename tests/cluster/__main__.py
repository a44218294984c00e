"""`make cluster`: a Kubernetes of two nodes on this machine, sidestep installed in it, and what a user would see."""

import os
import signal
import sys
import time
from contextlib import ExitStack

import click

from tests.cluster.builder import BIN, BuildFailed, build_all
from tests.cluster.checks import Check, of_nodes, of_plain_pods, run_all
from tests.cluster.cluster import Cluster
from tests.cluster.components import components
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
    exit_on_signals()
    try:
        build_all(components(), say=say)
    except BuildFailed as error:
        sys.exit(f"cluster: {error}")
    with ExitStack() as stack:
        made = stack.enter_context(Cluster())
        # once down is where it goes, a second Ctrl-C must not stop it halfway
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.SIG_IGN)
        if keep:
            made.keep()
            tell_how_to_use(made)
        good, of = run_all(checks(made))
    click.echo(f"cluster: {good} of {of} as expected")
    sys.exit(0 if good == of else 1)


def checks(made: Cluster) -> list[Check]:
    """Bring everything up, and what is to be looked at then."""
    began = time.monotonic()
    made.start([*images.make_images(REPOSITORY / "build" / "images"), IMAGE])
    say(f"two nodes are Ready after {time.monotonic() - began:.0f} s")
    sidestep, pods = Sidestep(made), Pods(made.control)
    sidestep.install()
    say(f"sidestep is Ready after {time.monotonic() - began:.0f} s")
    made.control.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": PLAIN[0].namespace}})
    for pod, node in zip(PLAIN, made.nodes, strict=True):
        pods.make(pod, node.name)
    pods.wait_until_ready(*PLAIN)
    say(f"all pods are Ready after {time.monotonic() - began:.0f} s")
    return of_nodes(made, sidestep) + of_plain_pods(pods, PLAIN[0], PLAIN)


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
