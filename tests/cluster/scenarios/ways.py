"""The ways into a pod and out of it: host network and ports, kubectl's, probes, both families, and out of the mesh."""

import json
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.cluster.addresses import CONTROL
from tests.cluster.bed import CLIENT, FAR, NAMESPACE, NEAR, PLAIN, Bed
from tests.cluster.builder import BIN
from tests.cluster.checks import Check, answered_by, equals, soon, wrong_with
from tests.cluster.cluster import is_ready
from tests.cluster.grpc_image import ECHO, GRPC, import_grpc_image
from tests.cluster.host import CommandFailed
from tests.cluster.load import server
from tests.cluster.load.load import python
from tests.cluster.pods import PORT, SERVER, PodName, Reply, fetching
from tests.lab import images
from tests.lab.waiting import wait_until

HOST_NETWORK, HOST_PORT, DUAL, PROBED, UNTOUCHED, GRPC_PROBED, GRPC_UNTOUCHED = (
    PodName(NAMESPACE, name)
    for name in ("host-network", "host-port", "dual", "probed", "untouched", "grpc-probed", "grpc-untouched")
)
# of each kind of probe, a pod whose probe the injector rewrites and one that it leaves alone
_PROBES = {"HTTP": (PROBED, UNTOUCHED), "gRPC": (GRPC_PROBED, GRPC_UNTOUCHED)}
_NOT_REWRITTEN = {"sidecar.istio.io/rewriteAppHTTPProbers": "false"}
_PORT_OF_HOST, _PORT_IN_HOST, _FORWARDED = 18080, 18081, 18082
_SECONDS = 60


def checks(bed: Bed) -> Iterator[Check]:
    """Pods are made at once; each is asked in its way."""
    node = bed.cluster.nodes[1]
    made = (HOST_NETWORK, HOST_PORT, DUAL, PROBED, UNTOUCHED, GRPC_PROBED, GRPC_UNTOUCHED)
    import_grpc_image(bed)
    try:
        _make(bed, node.name)
        bed.pods.wait_until_ready(*made)
        yield from _of_hosts(bed, node.name, node.host.place.ips[0])
        yield from _of_kubectl(bed)
        yield from _of_families(bed)
        yield from _of_outside(bed)
        yield from _of_probes(bed)
        yield from _in_the_clear(bed)
    finally:
        bed.mesh.require("PERMISSIVE")
        bed.pods.delete(*made)


def _make(bed: Bed, node: str) -> None:
    seen = {"httpGet": {"path": "/", "port": _PORT_IN_HOST}, "periodSeconds": 1}
    on_host = {**python("app", server.__file__, str(_PORT_IN_HOST)), "readinessProbe": seen}
    bed.pods.make(HOST_NETWORK, node, on_host, hostNetwork=True)
    port = {"containerPort": PORT, "hostPort": _PORT_OF_HOST}
    bed.pods.make(HOST_PORT, node, {**SERVER, "ports": [port]})
    both = {"proxyMetadata": {"ISTIO_DUAL_STACK": "true"}}
    container = python("app", server.__file__, probed=server.HTTP)
    bed.pods.make(DUAL, node, container, annotations={"proxy.istio.io/config": json.dumps(both)})
    bed.pods.make(PROBED, node)
    bed.pods.make(UNTOUCHED, node, annotations=_NOT_REWRITTEN)
    by_grpc = {"grpc": {"port": PORT}, "periodSeconds": 1}
    echo = {"name": "app", "image": GRPC, "command": [*ECHO, "serve", str(PORT)], "readinessProbe": by_grpc}
    bed.pods.make(GRPC_PROBED, node, echo, {"grpc": PORT})
    bed.pods.make(GRPC_UNTOUCHED, node, echo, {"grpc": PORT}, _NOT_REWRITTEN)


def _of_hosts(bed: Bed, node: str, address: str) -> Iterator[Check]:
    """A pod of the host's network is none of the mesh; a port of the host leads to the proxy."""
    yield Check(
        f"{HOST_NETWORK} is not captured", equals(partial(bed.sidestep.captures, node, str(HOST_NETWORK)), False)
    )
    told = partial(bed.pods.run, CLIENT, "wget", "-q", "-O", "-", f"http://{address}:{_PORT_IN_HOST}/")
    yield Check(f"{CLIENT} reaches {HOST_NETWORK}", equals(lambda: bool(json.loads(told())["server"]), True))
    by_port = partial(_headers, bed, f"http://{address}:{_PORT_OF_HOST}/cgi-bin/seen")
    yield Check(
        f"{HOST_PORT}'s proxy answers at the host's port", equals(lambda: by_port().get("server"), "istio-envoy")
    )


def _of_kubectl(bed: Bed) -> Iterator[Check]:
    """kubectl's own ways lead past the proxy, as with Istio's rules; what runs in the pod by them is captured."""
    direct = partial(_forwarded, bed, NEAR)
    yield Check(f"port-forward reaches {NEAR}'s application", soon(direct))
    mutual = answered_by(bed.pods, CLIENT, FAR.host, FAR, f"By={FAR.spiffe}", f"URI={CLIENT.spiffe}")
    yield Check("what kubectl exec runs is captured", mutual)
    yield Check("what a debug container runs is captured", partial(_debugged, bed, PROBED, FAR))
    yield Check(f"{FAR}'s proxy has logged requests", equals(partial(_logged, bed, FAR, " /cgi-bin/seen "), True))


def _of_families(bed: Bed) -> Iterator[Check]:
    """By each address of a pod in which Istio captures both."""
    for each in bed.pods.get(DUAL)["status"]["podIPs"]:
        family, proxy = ("IPv6", "::6") if ":" in each["ip"] else ("IPv4", "127.0.0.6")
        yield Check(f"{DUAL}'s proxy takes {family}", soon(equals(partial(_caller, bed, each["ip"]), proxy)))


def _of_outside(bed: Bed) -> Iterator[Check]:
    """The proxy passes on what is for nobody of the mesh."""
    place = f"{CONTROL.ips[0]}:8181"  # CoreDNS's own answer that it is ready, on the control plane's host
    told = partial(bed.pods.run, CLIENT, "timeout", "10", "wget", "-q", "-O", "-", f"http://{place}/ready")
    yield Check(f"{CLIENT} reaches what is for nobody in the mesh", equals(told, "OK"))
    passed = partial(_logged, bed, CLIENT, place, "PassthroughCluster")
    yield Check("its proxy has passed that on", soon(equals(passed, True)))


def _logged(bed: Bed, pod: PodName, *words: str) -> bool:
    """Whether the pod's proxy has logged a request or connection with all of these."""
    return any(all(word in line for word in words) for line in bed.pods.logs(pod, "istio-proxy").splitlines())


def _of_probes(bed: Bed) -> Iterator[Check]:
    """In STRICT kubelet reaches a rewritten probe alone."""
    bed.mesh.require("STRICT")
    for kind, (rewritten, untouched) in _PROBES.items():
        wait_until(partial(_is_unready, bed, untouched), f"{untouched} to be not Ready", _SECONDS)
        refused = equals(partial(_is_unready, bed, untouched), True)
        yield Check(f"in STRICT a {kind} probe that was not rewritten is refused", refused)
        answered = equals(partial(_is_unready, bed, rewritten), False)
        yield Check(f"in STRICT a rewritten {kind} probe is answered", answered)
    bed.mesh.require("PERMISSIVE")
    bed.pods.wait_until_ready(UNTOUCHED, GRPC_UNTOUCHED)


def _is_unready(bed: Bed, pod: PodName) -> bool:
    return not is_ready(bed.pods.get(pod))


def _in_the_clear(bed: Bed) -> Iterator[Check]:
    bed.mesh.require("DISABLE")
    for client in (CLIENT, PLAIN[0]):
        clear = answered_by(bed.pods, client, FAR.host, FAR)
        yield Check(f"in DISABLE {client} reaches {FAR} without mTLS", soon(clear))
    inbound = partial(bed.sidestep.ask_json, bed.cluster.nodes[1].name, "pods", str(FAR))
    yield Check(f"{FAR} is captured all the same", equals(lambda: inbound()["steering"], "steered"))


def _headers(bed: Bed, url: str) -> dict[str, str]:
    """Of the answer that the control plane's host gets."""
    told = bed.control.host.run(["curl", "-s", "-D", "-", "-o", "/dev/null", "--max-time", "10", url])
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in told.splitlines())}


def _forwarded(bed: Bed, pod: PodName) -> str:
    """What is wrong with the answer at the other end of `kubectl port-forward`."""
    forward = ["port-forward", "-n", pod.namespace, f"pod/{pod.name}", f"{_FORWARDED}:{PORT}"]
    enter = ["nsenter", f"--net={bed.control.host.netns}", str(BIN / "kubectl")]
    command = [*enter, f"--kubeconfig={bed.control.kubeconfig}", *forward]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
        try:
            assert forwarding.stdout is not None
            forwarding.stdout.readline()  # that it listens
            told = bed.control.host.run(
                ["curl", "-s", "--max-time", "10", f"http://127.0.0.1:{_FORWARDED}/cgi-bin/seen"]
            )
        finally:
            forwarding.terminate()
    return wrong_with(Reply.of(told), pod, ())


def _debugged(bed: Bed, pod: PodName, there: PodName) -> str:
    """What is wrong with the answer that an ephemeral container gets."""
    where = ["-n", pod.namespace, pod.name, "-c", "debug", f"--image={images.TOOLS}", "--image-pull-policy=Never"]
    bed.control.kubectl("debug", *where, "--", *fetching(there.host))

    def ended() -> bool:
        status = bed.pods.get(pod)["status"].get("ephemeralContainerStatuses", [])
        return any("terminated" in each["state"] for each in status)

    wait_until(ended, f"the debug container of {pod}", _SECONDS)
    return wrong_with(Reply.of(bed.pods.logs(pod, "debug")), there, [f"URI={pod.spiffe}"])


def _caller(bed: Bed, ip: str) -> Any:
    """Where the application sees a request to one of its addresses come from."""
    url = f"http://{f'[{ip}]' if ':' in ip else ip}:{server.HTTP}/"
    try:
        return json.loads(bed.pods.run(CLIENT, "timeout", "10", "wget", "-q", "-O", "-", url))["caller"]
    except CommandFailed as error:
        return str(error)
