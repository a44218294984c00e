"""The pods that are compared: a client and a server for each way, on the node of whoever captures them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf.layout import LEVELS
from cni.policy.annotations import ACCELERATION
from tests.bench.mesh.proxies import Service
from tests.bench.mesh.ratios import BASELINE
from tests.bench.real_mesh.image import FILES, IMAGE, SERVE, SERVED, make_image
from tests.cluster.bed import Bed
from tests.cluster.capturers import RULES, SIDESTEP, captured_by
from tests.cluster.checks import Check
from tests.cluster.host import CGROUPS
from tests.cluster.istio_cni import IstioCni
from tests.cluster.kubernetes_node import KubernetesNode
from tests.cluster.pods import PodName
from tests.lab.pod import APP_ID
from tests.lab.waiting import wait_until

NAMESPACE = "bench"
WAYS = (BASELINE, *LEVELS)
_SECONDS = 120  # the self-test of acceleration, on a machine that is busy


@dataclass(frozen=True)
class Pair:
    """`host` is where the client finds the server's Service."""

    way: str
    client: PodName
    server: PodName
    host: str
    cgroups: tuple[Path, ...]  # of both pods, in cgroup2's tree

    @property
    def pods(self) -> tuple[PodName, PodName]:
        """Both."""
        return self.client, self.server


def make_pairs(bed: Bed) -> Iterator[Pair]:
    """The first node's pods get their rules from Istio's own plugin, which goes then; sidestep has the second alone.

    Running pods keep Istio's rules. So nothing of sidestep is where the baseline is. Raises NotCaptured.
    """
    theirs, ours = bed.cluster.nodes
    bed.cluster.import_images([make_image(bed.cluster.directory)])
    istio = IstioCni(bed.cluster)
    istio.import_image()
    istio.install()
    bed.mesh.make_namespace(NAMESPACE)
    yield _pair(bed, theirs, BASELINE, {}, RULES)
    istio.uninstall()
    bed.sidestep.install(ours.name)
    _raise_level(bed, ours.name)
    for level in LEVELS:
        yield _pair(bed, ours, level, {ACCELERATION: level}, SIDESTEP)


def traffic(bed: Bed, pair: Pair) -> dict[str, int]:
    """What became of the messages of both pods, as `sidestep status` has it; nothing of pods with Istio's rules."""
    if pair.way == BASELINE:
        return {}
    told = bed.sidestep.ask_json(bed.cluster.nodes[1].name, "status")["pods"]
    found = [each["acceleration"] for each in told if each["pod"] in map(str, pair.pods)]
    return {key: sum(each[key] for each in found) for key in found[0] if key != "level"}


class NotCaptured(Exception):
    """A pod that was to be compared is not captured by who was to capture it."""


def _raise_level(bed: Bed, node: str) -> None:
    """The node's, so that each pair has the level of its pods. Raises TimeoutError with the agent's reason."""
    highest = list(LEVELS)[-1]
    # not by `sidestep accelerate`: the agent repeats a self-test for which the machine was too busy
    bed.sidestep.change("env", f"SIDESTEP_ACCELERATION={highest}")

    def told() -> dict[str, str]:
        found: dict[str, str] = bed.sidestep.ask_json(node, "status")["acceleration"]
        return found

    try:
        wait_until(lambda: told()["level"] == highest, f"level {highest} on {node}", _SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; it is {told()}") from None


def _pair(bed: Bed, node: KubernetesNode, way: str, annotations: dict[str, str], who: str) -> Pair:
    client, server = (PodName(NAMESPACE, f"{way}-{end}") for end in ("client", "server"))
    ports = {_port_name(each): each.port for each in SERVED.values()}
    bed.pods.make(client, node.name, _container(), annotations=annotations)
    bed.pods.make(server, node.name, _container(command=SERVE), ports, annotations=annotations)
    bed.pods.wait_until_ready(client, server)
    for check in captured_by(bed, [client, server], who):
        _require(check)
    host = str(bed.control.get("service", "-n", NAMESPACE, server.name)["spec"]["clusterIP"])
    return Pair(way, client, server, host, tuple(_cgroup(bed, pod) for pod in (client, server)))


def _require(check: Check) -> None:
    if wrong := check.look():
        raise NotCaptured(f"{check.sentence}: NOT as expected: {wrong}")


def _container(**more: Any) -> dict[str, Any]:
    return {
        "name": "app",
        "image": IMAGE,
        "workingDir": str(FILES),
        "securityContext": {"runAsUser": APP_ID},
        **more,
    }


def _port_name(service: Service) -> str:
    """By what stands before the dash, istiod knows what is spoken there."""
    spoken = {"http1": "http", "http2": "http2"}[service.speaks] if service.is_http else "tcp"
    return f"{spoken}-{service.name}"


def _cgroup(bed: Bed, pod: PodName) -> Path:
    uid = bed.pods.get(pod)["metadata"]["uid"]
    (found,) = (CGROUPS / "unified").glob(f"sidestep-cluster-{bed.cluster.id}-*/**/pod{uid}")
    return found
