"""sidestep by its Helm chart under load: taken over from the manifests, upgraded, rolled back, uninstalled, back."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.cluster.bed import Bed
from tests.cluster.checks import Check, at_once, equals, soon
from tests.cluster.cluster import is_ready
from tests.cluster.host import CommandFailed
from tests.cluster.load.load import load_on
from tests.cluster.newcomers import enrolled_after
from tests.cluster.release import Release
from tests.cluster.sidestep import NAMESPACE
from tests.lab.waiting import wait_until

_LEFT_OUT = "caller"  # an extra, so programs without it are others
_CHAIN = ["bridge", "portmap"]
_SECONDS = 60
# Helm 4 would apply on the server's side, where each later change of a value conflicts with kubectl's
_FROM_KUBECTL = ("--take-ownership", "--server-side=false")


def checks(bed: Bed) -> Iterator[Check]:
    """No request fails, the agents have the values of the release, and new pods are enrolled."""
    release = Release(bed)
    with load_on(bed) as load:
        try:
            taking_over = partial(release.install, *_FROM_KUBECTL)
            yield load.during("the chart takes the manifests' objects over", taking_over)
            yield from at_once(_of_nodes(bed, lacking=[], level="off"))
            changed = partial(release.upgrade, acceleration="proxy", env__SIDESTEP_LACKING=_LEFT_OUT)
            yield load.during("helm upgrade with other values", changed)
            yield from at_once(_of_nodes(bed, lacking=[_LEFT_OUT], level="proxy"))
            yield from enrolled_after(bed, "helm upgrade")
            yield load.during("kubelet restarts the agents while the API server is away", partial(_outage, bed))
            yield load.during("helm rollback", release.roll_back)
            yield from at_once(_of_nodes(bed, lacking=[], level="off"))
            too_little = partial(_say_too_little, bed, release)
            yield load.during("an agent with too little memory says so, and helm rollback", too_little)
            yield load.during("helm uninstall", release.uninstall)
            for node in bed.cluster.nodes:
                yield Check(f"the plugin is out of {node.name}'s chain", equals(node.plugins, _CHAIN))
            yield load.during("helm install", release.install)
            for node in bed.cluster.nodes:
                yield Check(f"the plugin is in {node.name}'s chain", equals(node.plugins, [*_CHAIN, "sidestep-cni"]))
            yield from enrolled_after(bed, "helm install")
        finally:
            release.uninstall()
            bed.sidestep.apply()


def _of_nodes(bed: Bed, lacking: list[str], level: str) -> Iterator[Check]:
    """What status says of the programs that the release has asked for, and of their level."""
    for node in bed.cluster.nodes:
        wanted = {"attached": True, "current": True, "lacking": lacking, "level": level}
        told = equals(partial(_status, bed, node.name), wanted)
        yield Check(f"the agent on {node.name} is as the release says", soon(told))  # the self-test takes its time


def _status(bed: Bed, node: str) -> dict[str, object]:
    told = bed.sidestep.status(node)
    return {
        **{key: told[key] for key in ("attached", "current")},
        "lacking": list(told["lacking"]),
        "level": told["acceleration"]["level"],
    }


def _say_too_little(bed: Bed, release: Release) -> None:
    """The new agent ends, and the log says why; then the one before comes back. Raises TimeoutError."""
    release.change(resources__limits__memory="100Mi")
    wait_until(
        lambda: any(map(partial(_says_why, bed), bed.sidestep.pods())), "an agent to say what it lacks", _SECONDS
    )
    release.roll_back()


def _says_why(bed: Bed, pod: dict[str, Any]) -> bool:
    try:
        log = bed.control.kubectl("logs", "-n", NAMESPACE, pod["metadata"]["name"])
    except CommandFailed:  # it has none yet
        return False
    return "this node can't capture: memory limit 100 MiB" in log


def _outage(bed: Bed) -> None:
    """Kill every agent while nobody can ask for a ConfigMap. Raises TimeoutError if one does not come back."""
    nodes = {node.name: node for node in bed.cluster.nodes}
    agents = bed.sidestep.pods()
    bed.control.host.kill("kube-apiserver")
    try:
        for pod in agents:
            nodes[pod["spec"]["nodeName"]].kill_container(pod["status"]["containerStatuses"][0]["containerID"])
        wait_until(lambda: all(map(partial(_is_healthy, bed), agents)), "the agents without an API server", _SECONDS)
    finally:
        bed.control.start_apiserver()
    wait_until(lambda: all(map(is_ready, bed.sidestep.pods())), "the agents to be Ready again", _SECONDS)


def _is_healthy(bed: Bed, pod: dict[str, Any]) -> bool:
    """Whether it answers kubelet's probe; of one that was killed, only the next container does."""
    address = pod["status"]["podIP"]
    host = f"[{address}]" if ":" in address else address
    try:
        bed.control.host.run(["curl", "-sf", "-m", "2", f"http://{host}:8000/healthz"])
    except CommandFailed:
        return False
    return True
