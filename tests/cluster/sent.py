"""`make renew-sent`: asks a real istiod what it sends to sidecars, for the Envoys of the node tests (tests/lab/istiod).

Two pods of a dual-stack mesh are asked for their configuration: one in REDIRECT mode and one in TPROXY mode. Their
Service has a port for HTTP, one for TCP, and one for a protocol in which the server speaks first. Istio allows such a
protocol only without mTLS, so a policy says that.
"""

import json
import sys
from typing import Any

import click

from tests.cluster.bed import NAMESPACE, Bed
from tests.cluster.builder import BuildFailed, build_all
from tests.cluster.cluster import Cluster
from tests.cluster.components import components
from tests.cluster.host import CommandFailed, DaemonEnded
from tests.cluster.mesh import DUAL_STACK
from tests.cluster.pods import PodName
from tests.lab import images
from tests.lab.demo import exit_on_signals
from tests.lab.istiod.sent import HTTP, SENT, SERVER_FIRST, SERVICE, TCP
from tests.lab.node import REPOSITORY

Json = dict[str, Any]
_LISTENERS = ("virtualOutbound", "virtualInbound", f"0.0.0.0_{HTTP}")
_HOST = f"{SERVICE}.{NAMESPACE}.svc.cluster.local"
_CLUSTERS = (
    "BlackHoleCluster",
    "PassthroughCluster",
    "InboundPassthroughCluster",
    *(f"inbound|{port}||" for port in (HTTP, TCP, SERVER_FIRST)),
    f"outbound|{HTTP}||{_HOST}",
)


def sent_to(bed: Bed, pod: PodName) -> Json:
    """What a pod's proxy has, as far as the node tests need it: listeners, clusters and routes as istiod wrote them."""
    ask = ["exec", "-n", pod.namespace, pod.name, "-c", "istio-proxy", "--", "pilot-agent", "request", "GET"]
    sections = json.loads(bed.control.kubectl(*ask, "config_dump"))["configs"]
    of = {each["@type"].rpartition(".")[2]: each for each in sections}
    listeners = {
        each["active_state"]["listener"]["name"]: each["active_state"]["listener"]
        for each in of["ListenersConfigDump"]["dynamic_listeners"]
        if "active_state" in each
    }
    clusters = {
        each["cluster"]["name"]: each["cluster"] for each in of["ClustersConfigDump"]["dynamic_active_clusters"]
    }
    routes = [each["route_config"] for each in of["RoutesConfigDump"]["dynamic_route_configs"]]
    (routed,) = [each for each in routes if each["name"] == str(HTTP)]
    hosts = (f"{_HOST}:{HTTP}", "allow_any")
    routed["virtual_hosts"] = [each for each in routed["virtual_hosts"] if each["name"] in hosts]
    return {
        "listeners": [_untyped(_without_logs(listeners[name])) for name in _LISTENERS],
        "clusters": [_untyped(clusters[name]) for name in _CLUSTERS],
        "routes": [_untyped(routed)],
    }


def make_pods(bed: Bed) -> dict[str, PodName]:
    """One for each interception mode."""
    bed.mesh.make_namespace(NAMESPACE)
    pods = {mode: PodName(NAMESPACE, mode.lower()) for mode in SENT}
    metadata = {"name": SERVICE, "namespace": NAMESPACE, "labels": {"app": SERVICE}}
    ports = {"http": HTTP, "tcp": TCP, "tcp-first": SERVER_FIRST}
    service = {
        "selector": {"app": SERVICE},
        "ports": [{"name": name, "port": port} for name, port in ports.items()],
        "ipFamilyPolicy": "RequireDualStack",
    }
    policy = {
        "selector": {"matchLabels": {"app": SERVICE}},
        "mtls": {"mode": "PERMISSIVE"},
        "portLevelMtls": {str(SERVER_FIRST): {"mode": "DISABLE"}},
    }
    bed.control.apply(
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata, "spec": policy},
        *(_pod(pod, mode, bed.cluster.nodes[0].name) for mode, pod in pods.items()),
    )
    bed.pods.wait_until_ready(*pods.values())
    return pods


def _pod(pod: PodName, mode: str, node: str) -> Json:
    annotations = {"sidecar.istio.io/interceptionMode": mode}
    metadata = {"name": pod.name, "namespace": pod.namespace, "labels": {"app": SERVICE}, "annotations": annotations}
    container = {"name": "app", "image": images.TOOLS, "command": ["sleep", "1000"]}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 1}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _untyped(resource: Json) -> Json:
    """As a bootstrap has it, which knows the types by the places."""
    return {key: value for key, value in resource.items() if key != "@type"}


def _without_logs(thing: Any) -> Any:
    """Access logs are the tests' own."""
    if isinstance(thing, dict):
        return {key: _without_logs(value) for key, value in thing.items() if key != "access_log"}
    return [_without_logs(each) for each in thing] if isinstance(thing, list) else thing


@click.command()
def renew() -> None:
    """Write the files anew."""
    exit_on_signals()
    try:
        build_all(components(), say=lambda line: click.echo(f"renew-sent: {line}"))
        with Cluster() as cluster:
            bed = Bed.of(cluster)
            bed.start_nodes()
            bed.sidestep.install()
            bed.mesh.install(DUAL_STACK)
            for mode, pod in make_pods(bed).items():
                SENT[mode].write_text(json.dumps(sent_to(bed, pod), indent=1, sort_keys=True) + "\n")
                click.echo(f"renew-sent: {SENT[mode].relative_to(REPOSITORY)}")
    except (BuildFailed, CommandFailed, DaemonEnded, TimeoutError) as error:
        sys.exit(f"renew-sent: {error}")


if __name__ == "__main__":
    renew()
