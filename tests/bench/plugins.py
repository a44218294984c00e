"""`make bench-plugins`: a whole ADD of Istio's own CNI plugin and of sidestep's, in a real Kubernetes, interleaved.

Both are started by hand on one node of the cluster of tests/cluster, for Pods that its API server has. Istio's plugin
asks that server and writes its rules with iptables-nft. sidestep's asks the agent that its DaemonSet runs there. The
Pods' own sandboxes never come up, because they want a Secret that does not exist.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from tests.bench.cni import Rounds, report
from tests.cluster.bed import Bed
from tests.cluster.builder import BIN, BuildFailed, build_all
from tests.cluster.cluster import Cluster
from tests.cluster.components import components
from tests.cluster.host import CommandFailed, DaemonEnded
from tests.lab import images
from tests.lab.demo import exit_on_signals
from tests.lab.inside import PYTHON

NAMESPACE = "bench"
LEVELS = (1, 8, 16)
SIDES = {"sidestep": "sidestep ADD", "istio": "istio-cni ADD"}
_RUN_DIR = Path("/run/sidestep-bench")  # where Istio's plugin looks for its kubeconfig and writes its log
_DRIVER = Path(__file__).with_name("adding.py")


def measured(bed: Bed, rounds: int, each: int) -> dict[int, Rounds]:
    """Seconds of every ADD on the first node, by level, round and side."""
    node = bed.cluster.nodes[0]
    names = [f"waiting-{number}" for number in range(max(LEVELS))]
    bed.control.make_namespace(NAMESPACE)
    bed.control.wait("create", "serviceaccount/default", f"--namespace={NAMESPACE}")
    bed.control.apply(*(_waiting(name, node.name) for name in names))
    kubeconfig = node.host.directory / "istio-cni-kubeconfig"
    kubeconfig.write_bytes(bed.control.kubeconfig.read_bytes())
    node.host.run(["mkdir", "-p", _RUN_DIR])
    node.host.run(["cp", kubeconfig, _RUN_DIR / kubeconfig.name])
    (conflist,) = node.host.run(["find", "/etc/cni/net.d", "-name", "*.conflist"]).split()
    (ours,) = [each for each in json.loads(node.host.run(["cat", conflist]))["plugins"] if "sidestep" in each["type"]]
    theirs = {"type": "istio-cni", "cni_agent_run_dir": str(_RUN_DIR)}
    sides = {
        "sidestep": {"binary": f"/opt/cni/bin/{ours['type']}", "config": ours, "deletes": True},
        "istio": {"binary": str(BIN / "istio-cni"), "config": theirs, "deletes": False},
    }
    asked = {"sides": sides, "pods": names, "namespace": NAMESPACE, "levels": LEVELS, "rounds": rounds, "each": each}
    printed = node.host.run([*PYTHON, _DRIVER.read_text()], json.dumps(asked))
    return {int(level): found for level, found in json.loads(printed).items()}


def _waiting(name: str, node: str) -> dict[str, Any]:
    """A Pod with a sidecar as the injector writes it; its volume keeps kubelet from making a sandbox."""
    metadata = {"name": name, "namespace": NAMESPACE, "annotations": {"sidecar.istio.io/status": "{}"}}
    proxy = {
        "name": "istio-proxy",
        "image": images.TOOLS,
        "args": ["proxy", "sidecar"],
        "env": [{"name": "ISTIO_DUAL_STACK", "value": "true"}],
        "volumeMounts": [{"name": "missing", "mountPath": "/missing"}],
    }
    spec = {
        "nodeName": node,
        "containers": [proxy],
        "volumes": [{"name": "missing", "secret": {"secretName": "missing"}}],
        "terminationGracePeriodSeconds": 1,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@click.command()
@click.option("--rounds", default=10, show_default=True, help="Times both sides take turns.")
@click.option("--each", default=16, show_default=True, help="ADDs a side and round.")
def bench(rounds: int, each: int) -> None:
    """Compare whole ADDs at 1, 8 and 16 at once."""
    exit_on_signals()
    try:
        build_all(components(), say=lambda line: click.echo(f"bench-plugins: {line}", err=True))
        with Cluster() as cluster:
            bed = Bed.of(cluster)
            bed.start_nodes()
            bed.sidestep.install()
            found = measured(bed, rounds, each)
    except (BuildFailed, CommandFailed, DaemonEnded, TimeoutError) as error:
        sys.exit(f"bench-plugins: {error}")
    for level, of_level in found.items():
        report(level, of_level, SIDES, "istio")


if __name__ == "__main__":
    bench()
