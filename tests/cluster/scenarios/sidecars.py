"""Pods with sidecars of every kind: what their annotations and their owners ask for is so."""

import json
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address
from typing import Any

from tests.cluster.bed import CLIENT, FAR, NAMESPACE, NEAR, PLAIN, Bed
from tests.cluster.checks import Check, answered_by, at_once, equals, soon, wrong_with
from tests.cluster.load import server
from tests.cluster.load.load import python
from tests.cluster.pods import SERVER, PodName, Reply, account_and_service, fetching
from tests.lab import images
from tests.lab.waiting import wait_until

_ORDINARY = {"sidecar.istio.io/nativeSidecar": "false"}
ORDINARY, INIT, EARLY, LATE, STRICT, TPROXY, RESOLVER = (
    PodName(NAMESPACE, name) for name in ("ordinary", "init", "early", "late", "strict", "tproxy", "resolver")
)
JOB, STATEFUL = "job", "stateful"
_OUTSIDE = "only-istio-knows.test"  # a name that no DNS server has
_SECONDS = 120


def checks(bed: Bed) -> Iterator[Check]:
    """All are made at once."""
    node = bed.cluster.nodes[0].name
    made = (ORDINARY, INIT, EARLY, LATE, STRICT, TPROXY, RESOLVER)
    try:
        _make(bed, node)
        bed.pods.wait_until_ready(*made)
        enrolled = [each["pod"] for each in bed.sidestep.enrolled(node)]
        for pod in made:
            yield Check(f"sidestep captures {pod}", equals(partial(enrolled.count, str(pod)), 1))
        yield from at_once(_of_each(bed))
        yield from _of_job(bed)
        yield from _of_stateful(bed, node)
    finally:
        names = [f"job/{JOB}", f"statefulset/{STATEFUL}", f"service/{STATEFUL}", f"serviceaccount/{STATEFUL}"]
        bed.control.kubectl("delete", "-n", NAMESPACE, "--ignore-not-found", *names)
        bed.control.kubectl("delete", "-n", NAMESPACE, "--ignore-not-found", "serviceentry.networking.istio.io/outside")
        bed.pods.delete(*made)


def _make(bed: Bed, node: str) -> None:
    pods = bed.pods
    pods.make(ORDINARY, node, annotations=_ORDINARY)
    pods.make(INIT, node, initContainers=[_container("asks", *fetching(FAR.host))])
    plain = _container("asks", "sh", "-c", f"{' '.join(fetching(pods.ip(PLAIN[0])))} || true")
    early = {**_ORDINARY, "sidestep.io/early-outbound": "allow"}
    pods.make(EARLY, node, annotations=early, initContainers=[plain])
    pods.make(LATE, node, annotations=_ORDINARY, initContainers=[plain])
    # with the proxy's user, which takes a process of an ordinary pod out of the mesh
    impostor = {**SERVER, "securityContext": {"runAsUser": 1337, "runAsGroup": 1337}}
    pods.make(STRICT, node, impostor, annotations={"sidestep.io/strict-proxy": "true"})
    transparent = {"sidecar.istio.io/interceptionMode": "TPROXY"}
    pods.make(TPROXY, node, python("app", server.__file__, probed=server.HTTP), annotations=transparent)
    capture = {"proxyMetadata": {"ISTIO_META_DNS_CAPTURE": "true"}}
    pods.make(RESOLVER, node, annotations={"proxy.istio.io/config": json.dumps(capture)})
    bed.control.apply(_outside(pods.ip(PLAIN[0])), _job(), *_stateful(node))


def _of_each(bed: Bed) -> Iterator[Check]:
    pods = bed.pods
    for client, there in ((CLIENT, ORDINARY), (ORDINARY, FAR), (EARLY, FAR), (LATE, FAR), (RESOLVER, FAR)):
        yield Check(f"{client} and {there} talk mTLS", soon(_mutual(bed, client, there)))
    yield Check(f"{ORDINARY}'s proxy is an ordinary container", equals(partial(_has_ordinary_proxy, bed), True))
    said = partial(_wrong_in_log, bed, INIT, FAR, f"URI={INIT.spiffe}")
    yield Check("beside a native sidecar an init container talks mTLS", said)
    yield Check("early-outbound lets an init container reach the network", partial(_wrong_in_log, bed, EARLY, PLAIN[0]))
    refused = equals(lambda: "Connection refused" in pods.logs(LATE, "asks"), True)
    yield Check("without early-outbound an init container is refused", refused)
    yield Check(f"the proxy's user does not take {STRICT} out of the mesh", soon(_mutual(bed, STRICT, FAR)))
    address = ip_address(pods.ip(CLIENT))
    yield Check(f"{TPROXY}'s application sees the client's address", soon(equals(partial(_caller, bed), address)))
    reached = answered_by(pods, RESOLVER, _OUTSIDE, PLAIN[0])
    yield Check(f"pilot-agent answers {RESOLVER}'s question for {_OUTSIDE}", soon(reached))
    yield Check(f"nobody answers {CLIENT}'s", lambda: pods.ask(CLIENT, _OUTSIDE).server)


def _of_job(bed: Bed) -> Iterator[Check]:
    bed.control.wait("condition=Complete", f"job/{JOB}", f"--namespace={NAMESPACE}")
    told = Reply.of(bed.control.kubectl("logs", "-n", NAMESPACE, f"job/{JOB}", "-c", "app"))
    named = f"URI=spiffe://cluster.local/ns/{NAMESPACE}/sa/default"
    yield Check("a Job talks mTLS, and completes", lambda: wrong_with(told, NEAR, [named]))


def _of_stateful(bed: Bed, node: str) -> Iterator[Check]:
    """One pod after the other with the same name."""
    pod = PodName(NAMESPACE, f"{STATEFUL}-0")
    bed.pods.wait_until_ready(pod)
    before = _sandboxes(bed, node, pod)
    bed.control.kubectl("delete", "-n", NAMESPACE, f"pod/{pod.name}")
    bed.pods.wait_until_ready(pod)
    after = _sandboxes(bed, node, pod)
    wrong = "" if len(before) == len(after) == 1 and before != after else f"{before}, then {after}"
    yield Check(f"{pod} is enrolled once, before and after it was made again", lambda: wrong)
    name = PodName(NAMESPACE, STATEFUL)
    mutual = answered_by(bed.pods, CLIENT, name.host, pod, f"By={name.spiffe}", f"URI={CLIENT.spiffe}")
    yield Check(f"{CLIENT} and {pod} talk mTLS by a headless Service", soon(mutual))


def _mutual(bed: Bed, client: PodName, there: PodName) -> Any:
    return answered_by(bed.pods, client, there.host, there, f"By={there.spiffe}", f"URI={client.spiffe}")


def _has_ordinary_proxy(bed: Bed) -> bool:
    return "istio-proxy" in [each["name"] for each in bed.pods.get(ORDINARY)["spec"]["containers"]]


def _wrong_in_log(bed: Bed, pod: PodName, there: PodName, *identities: str) -> str:
    return wrong_with(Reply.of(bed.pods.logs(pod, "asks")), there, identities)


def _caller(bed: Bed) -> object:
    """Where the application of the TPROXY pod sees CLIENT's request come from."""
    told = bed.pods.run(CLIENT, "wget", "-q", "-O", "-", f"http://{TPROXY.host}:{server.HTTP}/")
    return ip_address(json.loads(told)["caller"])


def _sandboxes(bed: Bed, node: str, pod: PodName) -> list[str]:
    """The sandbox ids of this name, as sidestep has them."""
    found: list[str] = []

    def listed() -> bool:
        found[:] = [each["container_id"] for each in bed.sidestep.enrolled(node) if each["pod"] == str(pod)]
        return bool(found)

    wait_until(listed, f"{pod} in sidestep pods", _SECONDS)
    return found


def _container(name: str, *argv: str) -> dict[str, Any]:
    return {"name": name, "image": images.TOOLS, "command": list(argv)}


def _outside(ip: str) -> dict[str, Any]:
    """A name that istiod tells the proxies, with an address that nobody has."""
    spec = {
        "hosts": [_OUTSIDE],
        "addresses": ["240.240.0.7"],
        "ports": [{"number": 8080, "name": "http", "protocol": "HTTP"}],
        "resolution": "STATIC",
        "endpoints": [{"address": ip}],
    }
    metadata = {"name": "outside", "namespace": NAMESPACE}
    return {"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": metadata, "spec": spec}


def _job() -> dict[str, Any]:
    spec = {"containers": [_container("app", *fetching(NEAR.host))], "restartPolicy": "Never"}
    metadata = {"name": JOB, "namespace": NAMESPACE}
    template = {"spec": spec}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}


def _stateful(node: str) -> list[dict[str, Any]]:
    """With the headless Service that it needs."""
    name = PodName(NAMESPACE, STATEFUL)
    labels = {"app": STATEFUL}
    pod = {
        "serviceAccountName": STATEFUL,
        "nodeName": node,
        "containers": [dict(SERVER)],
        "terminationGracePeriodSeconds": 1,
    }
    spec = {
        "serviceName": STATEFUL,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    metadata = {"name": STATEFUL, "namespace": NAMESPACE}
    own = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}
    return [*account_and_service(name, {"http": SERVER["ports"][0]["containerPort"]}, clusterIP="None"), own]
