"""What operators see and set of pods that run: coverage, what is denied, policies that change, flows."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.cluster.addresses import CONTROL
from tests.cluster.bed import FAR, NAMESPACE, Bed
from tests.cluster.checks import Check, answered_by, equals, soon
from tests.cluster.host import CommandFailed
from tests.cluster.pods import PodName

SEEN, STRICT = PodName(NAMESPACE, "seen"), PodName(NAMESPACE, "denying")
# CoreDNS's own answer that it is ready, on the control plane's host: for nobody in the mesh
_OUTSIDE_PORT = 8181
_OUTSIDE = f"{CONTROL.ips[0]}:{_OUTSIDE_PORT}"
_EXCLUDED = "traffic.sidecar.istio.io/excludeOutboundPorts"
_ANNOTATIONS = {_EXCLUDED: str(_OUTSIDE_PORT), "sidestep.io/live-policy": "true"}


def checks(bed: Bed) -> Iterator[Check]:
    """One pod that excludes a port and follows its annotations, and one that denies what it has not asked for."""
    node = bed.cluster.nodes[0].name
    try:
        bed.pods.make(SEEN, node, annotations=_ANNOTATIONS)
        bed.pods.make(STRICT, node, annotations={"sidestep.io/uncaptured": "deny"})
        bed.pods.wait_until_ready(SEEN, STRICT)
        yield from _of_coverage(bed, node)
        yield from _of_policies(bed, node)
        yield from _of_flows(bed, node)
        yield from _of_denial(bed, node)
    finally:
        bed.pods.delete(SEEN, STRICT)


def _of_coverage(bed: Bed, node: str) -> Iterator[Check]:
    named = (f"By={FAR.spiffe}", f"URI={SEEN.spiffe}")
    yield Check(f"{SEEN} and {FAR} talk mTLS", soon(answered_by(bed.pods, SEEN, FAR.host, FAR, *named)))
    yield Check(f"{SEEN} reaches an excluded port", equals(partial(_ask_outside, bed, SEEN), "OK"))
    excluded = ("O1", {"name": _EXCLUDED, "value": str(_OUTSIDE_PORT)}, "wget")
    yield Check("coverage has it, with rule, annotation and process", equals(partial(_past, bed, node), excluded))
    shares = partial(lambda: 0 < bed.sidestep.ask_json(node, "coverage", str(SEEN))["covered"] < 1)
    yield Check("coverage tells the share", equals(shares, True))


def _of_policies(bed: Bed, node: str) -> Iterator[Check]:
    captured = partial(_verdict, bed, node)
    _annotate(bed, _EXCLUDED, "9999")
    yield Check("a running pod follows its annotation", soon(equals(captured, "captured")))
    yield Check(f"{SEEN} reaches the port by its proxy", equals(partial(_ask_outside, bed, SEEN), "OK"))
    passed = partial(_has_logged, bed, _OUTSIDE, "PassthroughCluster")
    yield Check("its proxy has passed that on", soon(equals(passed, True)))
    _annotate(bed, _EXCLUDED, "many")
    yield Check("a refused value is an Event", soon(equals(partial(_has_event, bed, "LivePolicyRefused"), True)))
    yield Check("and the policy stays as it was", equals(captured, "captured"))


def _of_flows(bed: Bed, node: str) -> Iterator[Check]:
    rows = partial(_flow_rows, bed, node)
    # the application calls the Service, and that is its original destination
    service = bed.control.get("service", "-n", FAR.namespace, FAR.name)["spec"]["clusterIP"]
    yield Check(f"flows has what {SEEN} asked {FAR}, with its bytes", equals(lambda: service in rows(), True))


def _of_denial(bed: Bed, node: str) -> Iterator[Check]:
    asked = f"{bed.pods.ip(FAR)}"
    yield Check(f"{STRICT} reaches {FAR}, which is captured", soon(answered_by(bed.pods, STRICT, asked, FAR)))
    refused = partial(_fails, bed, STRICT, "nslookup", "kubernetes.default.svc.cluster.local")
    yield Check("a nameserver past the proxy is refused to it", equals(refused, True))
    found = partial(lambda: {each["port"] for each in bed.sidestep.ask_json(node, "coverage", str(STRICT))["refusals"]})
    yield Check("coverage has the refusal", equals(found, {53}))


def _ask_outside(bed: Bed, pod: PodName) -> str:
    return bed.pods.run(pod, "timeout", "10", "wget", "-q", "-O", "-", f"http://{_OUTSIDE}/ready")


def _past(bed: Bed, node: str) -> tuple[str, Any, str]:
    rows = bed.sidestep.ask_json(node, "coverage", str(SEEN))["past_the_proxy"]
    row = next(each for each in rows if each["peer"] == _OUTSIDE)
    return row["rule"], row["annotation"], row["process"]["command"]


def _verdict(bed: Bed, node: str) -> str:
    return str(bed.sidestep.ask_json(node, "explain", str(SEEN), _OUTSIDE)["verdict"])


def _annotate(bed: Bed, name: str, value: str) -> None:
    bed.control.kubectl("annotate", "--overwrite", "-n", SEEN.namespace, "pod", SEEN.name, f"{name}={value}")


def _has_event(bed: Bed, reason: str) -> bool:
    about = f"involvedObject.name={SEEN.name},reason={reason}"
    events = bed.control.kubectl("get", "events", "-n", SEEN.namespace, "--field-selector", about, "-o", "json")
    return bool(json.loads(events)["items"])


def _has_logged(bed: Bed, *words: str) -> bool:
    return any(all(word in line for word in words) for line in bed.pods.logs(SEEN, "istio-proxy").splitlines())


def _flow_rows(bed: Bed, node: str) -> set[str]:
    """The addresses of captured flows that have carried something both ways."""
    rows = bed.sidestep.ask_json(node, "flows", str(SEEN))["flows"]
    return {each["address"] for each in rows if each["verdict"] == "captured" and each["received_bytes"] > 0}


def _fails(bed: Bed, pod: PodName, *argv: str) -> bool:
    try:
        bed.pods.run(pod, "timeout", "10", *argv)
    except CommandFailed:
        return True
    return False
