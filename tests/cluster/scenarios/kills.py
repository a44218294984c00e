"""What a node and the control plane lose and get back, under load: agents, kubelet, containerd, the API server."""

import json
from collections.abc import Iterator
from functools import partial

from tests.cluster.bed import Bed
from tests.cluster.checks import Check, equals
from tests.cluster.cluster import is_ready
from tests.cluster.load.load import Load, load_on
from tests.cluster.newcomers import enrolled_after
from tests.lab.waiting import wait_until

_REQUESTS = 100  # of each flow while the API server is away; each takes a tenth of a second and a little
_SECONDS = 60


def checks(bed: Bed) -> Iterator[Check]:
    """No request fails, and new pods are enrolled afterwards."""
    with load_on(bed) as load:
        yield load.during("kill -9 of every agent", bed.sidestep.kill)
        yield from enrolled_after(bed, "agents")
        for daemon in ("kubelet", "containerd"):
            yield load.during(f"kill -9 of every {daemon}", partial(_restart, bed, daemon))
        yield from enrolled_after(bed, "kubelet and containerd")
        yield from _without_api_server(bed, load)
        yield from enrolled_after(bed, "outage")


def _restart(bed: Bed, daemon: str) -> None:
    for node in bed.cluster.nodes:
        node.restart(daemon)
    bed.control.kubectl("wait", "--for=condition=Ready", "nodes", "--all", f"--timeout={_SECONDS}s")


def _without_api_server(bed: Bed, load: Load) -> Iterator[Check]:
    """Agents say that they don't know the Pods any more, and change nothing."""
    addresses = bed.sidestep.addresses()
    plugins = [node.plugins() for node in bed.cluster.nodes]
    answers: dict[str, str] = {}
    chains: list[list[str]] = []

    def outage() -> None:
        bed.control.host.kill("kube-apiserver")
        try:
            load.wait_for_more(_REQUESTS)
            answers.update({node: bed.control.host.run(["curl", "-s", _url(ip)]) for node, ip in addresses.items()})
            chains.extend(node.plugins() for node in bed.cluster.nodes)
        finally:
            bed.control.start_apiserver()

    yield load.during("the API server is away", outage)
    for node in addresses:
        yield Check(f"the agent on {node} says that it is not ready then", partial(_lacks_nothing, answers, node))
    yield Check("the plugin stays in every chain", equals(lambda: chains, plugins))
    wait_until(lambda: all(map(is_ready, bed.sidestep.pods())), "the agents to be Ready again", _SECONDS)


def _lacks_nothing(answers: dict[str, str], node: str) -> str:
    """What /readyz said if it named no condition that is missing."""
    return "" if "missing" in json.loads(answers[node]) else answers[node]


def _url(address: str) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:8000/readyz"
