"""Ambient mode beside sidecars, with a real istiod and kubelet, and a double of ztunnel on each node."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tests.cluster import mesh
from tests.cluster.bed import CLIENT, FAR, PLAIN, Bed
from tests.cluster.checks import Check, answered_by, at_once, equals, soon
from tests.cluster.cluster import is_ready
from tests.cluster.host import CommandFailed
from tests.cluster.load import server
from tests.cluster.load.load import PYTHON, python
from tests.cluster.pods import PodName, account_and_service, pod_of
from tests.cluster.release import Release
from tests.cluster.sets import sets
from tests.cluster.ztunnel import Ztunnel
from tests.lab.ambient import MODE, REDIRECTION
from tests.lab.waiting import wait_until

NAMESPACE = "ambient"
# of the namespace in ambient mode; ONE, TWO and OUT are on one node, THREE on the other; OUT's own label says none
ONE, TWO, THREE, OUT = (PodName(NAMESPACE, name) for name in ("one", "two", "three", "out"))
MEMBERS = (ONE, TWO, THREE)
ENABLED, PENDING = "enabled", "pending"
DIRECT: list[str] = []
OUTBOUND, INBOUND, TUNNEL = "ztunnel-outbound", "ztunnel-inbound", "ztunnel-tunnel"
# the double answers no DNS
_AMBIENT = sets(["ambient.enabled=true", "ambient.dnsCapture=false"])
_ISTIOD: mesh.Values = {"pilot": {"env": {"PILOT_ENABLE_AMBIENT": "true"}}}
_FROM_KUBECTL = ("--take-ownership", "--server-side=false")
_REFUSED = "Connection refused"
_SECONDS = 90  # kubelet tries a sandbox again after up to that long
# asks once, or until /tmp/stop is there; prints the answers or how it failed, and how often
_ASK = """
import collections, http.client, json, os, sys
host, port, is_load = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
found = collections.Counter()
while True:
    try:
        there = http.client.HTTPConnection(host, port, timeout=10)
        there.request("GET", "/")
        said = json.load(there.getresponse())
        there.close()
        found[said["server"] + " " + said["caller"]] += 1
    except OSError as error:
        found[error.strerror or str(error) or type(error).__name__] += 1
    if not is_load or os.path.exists("/tmp/stop"):
        break
if is_load:
    os.remove("/tmp/stop")
print(json.dumps(found))
"""


def checks(bed: Bed) -> Iterator[Check]:
    """What joins is in the mesh once the double has it; what goes wrong closes pods, and never opens them."""
    release, ztunnel = Release(bed), Ztunnel(bed)
    try:
        bed.mesh.install_charts(_ISTIOD)
        release.install(*_FROM_KUBECTL, *_AMBIENT)
        bed.control.make_namespace(NAMESPACE, {MODE: "ambient"})
        yield from _without_ztunnel(bed, ztunnel)
        yield from _of_membership(bed, ztunnel)
        yield from _of_traffic(bed, ztunnel)
        yield from _of_probes(bed, ztunnel)
        yield from _of_labels(bed, ztunnel)
        yield from _of_agents(bed, ztunnel)
        yield from _of_replacement(bed, ztunnel)
        yield from _of_kills(bed, ztunnel)
        yield from _of_absence(bed, ztunnel)
    finally:
        bed.control.kubectl("delete", "--ignore-not-found", "namespace", NAMESPACE)
        ztunnel.uninstall()
        release.uninstall()
        bed.sidestep.apply()
        bed.mesh.install_charts()


def _without_ztunnel(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """A pod that is made then waits, and comes up by itself once a ztunnel is there."""
    here = bed.cluster.nodes[0].name
    _make(bed, ONE, here)
    wait_until(lambda: _redirection(bed, ONE) == PENDING, f"{ONE} to be {PENDING}", _SECONDS)
    yield Check(f"without a ztunnel {ONE} does not run", equals(partial(_is_ready, bed, ONE), False))
    yield Check("an Event says why", soon(partial(_lacks_event, bed, ONE)))
    yield Check(f"istiod does not have {ONE} by HBONE", equals(lambda: ONE in _by_hbone(bed), False))
    ztunnel.install()
    bed.pods.wait_until_ready(ONE)


def _of_membership(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    here, there = (node.name for node in bed.cluster.nodes)
    _make(bed, TWO, here, probe={"tcpSocket": {"port": server.LINES}, "periodSeconds": 1})
    _make(bed, THREE, there)
    _make(bed, OUT, here, {MODE: "none"})
    bed.pods.wait_until_ready(TWO, THREE, OUT)
    for pod in MEMBERS:
        yield Check(f"{pod} is {ENABLED}", equals(partial(_redirection, bed, pod), ENABLED))
        yield Check(f"the double has accepted {pod}", equals(partial(_is_accepted, bed, ztunnel, pod), True))
    for pod in (OUT, PLAIN[0], CLIENT):
        yield Check(f"{pod} has no annotation", equals(partial(_redirection, bed, pod), None))
        yield Check(f"the double has not heard of {pod}", equals(partial(_is_accepted, bed, ztunnel, pod), False))
    yield Check("istiod has by HBONE what is enabled", soon(equals(lambda: set(_by_hbone(bed)), set(MEMBERS))))


def _of_traffic(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """In the clear from double to double first, and then by the tunnel to whom istiod has by HBONE."""
    look = partial(_passes, bed, ztunnel)
    for client, target in ((ONE, TWO), (ONE, THREE), (THREE, ONE)):
        yield Check(f"{client} reaches {target} by both doubles", look(client, target, [OUTBOUND, INBOUND]))
    yield Check(f"{OUT} reaches {TWO} by its double", look(OUT, TWO, [INBOUND]))
    yield Check(f"{ONE} reaches {OUT} by its own double", look(ONE, OUT, [OUTBOUND]))
    yield Check(f"{ONE} reaches itself directly", look(ONE, ONE, DIRECT))
    by_name = partial(_asked, bed, ONE, THREE.host)
    yield Check(f"{ONE} reaches {THREE} by its Service", soon(equals(by_name, {f"three {bed.pods.ip(ONE)}": 1})))
    ztunnel.tunnel_to(list(_by_hbone(bed).values()))
    for client, target in ((ONE, TWO), (ONE, THREE), (THREE, ONE)):
        yield Check(f"{client} reaches {target} by the tunnel", look(client, target, [OUTBOUND, TUNNEL]))
    ztunnel.tunnel_to([])
    mutual = answered_by(bed.pods, CLIENT, FAR.host, FAR, f"By={FAR.spiffe}", f"URI={CLIENT.spiffe}")
    yield Check(f"beside them {CLIENT} and {FAR} talk mTLS", soon(mutual))
    yield Check(f"{CLIENT} reaches {ONE}", soon(equals(partial(_server_told, bed, CLIENT, ONE), ONE.name)))


def _of_probes(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """kubelet gets to the applications, and no other process of the host."""
    node = bed.cluster.nodes[0].host
    for pod in (ONE, TWO):
        yield Check(f"kubelet finds {pod} ready", equals(partial(_is_ready, bed, pod), True))
    passed = partial(_from_outside, bed, ztunnel)
    yield Check("no probe has come to the double", equals(passed, set()))
    place = f"http://{bed.pods.ip(ONE)}:{server.HTTP}/"
    yield Check("another process of the host is answered", soon(lambda: "" if _elsewhere(node, place) else "no"))
    yield Check("by the double", soon(equals(passed, {bed.pods.ip(ONE)})))


def _of_labels(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """A running pod leaves and comes in with its label; so do all with their namespace's."""
    look = partial(_passes, bed, ztunnel)
    _label(bed, f"pod/{TWO.name}", f"{MODE}=none", NAMESPACE)
    yield Check(f"{TWO} leaves with its label", soon(equals(partial(_redirection, bed, TWO), None)))
    yield Check(f"{ONE} reaches it by its own double alone", look(ONE, TWO, [OUTBOUND]))
    yield Check(f"{TWO} reaches {OUT} directly", look(TWO, OUT, DIRECT))
    yield Check("istiod has it by HBONE no more", soon(equals(lambda: TWO in _by_hbone(bed), False)))
    _label(bed, f"pod/{TWO.name}", f"{MODE}-", NAMESPACE)
    yield Check(f"{TWO} comes in again", soon(equals(partial(_redirection, bed, TWO), ENABLED)))
    yield Check(f"{ONE} reaches it by both doubles", look(ONE, TWO, [OUTBOUND, INBOUND]))
    _label(bed, f"namespace/{NAMESPACE}", f"{MODE}-")
    for pod in MEMBERS:
        yield Check(f"{pod} leaves with its namespace", soon(equals(partial(_redirection, bed, pod), None)))
    yield Check(f"{ONE} reaches {THREE} directly", look(ONE, THREE, DIRECT))
    _label(bed, f"namespace/{NAMESPACE}", f"{MODE}=ambient")
    yield from _all_enabled(bed, "with their namespace")


def _of_agents(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """kubelet starts those anew that were killed."""
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(_load, bed, ONE, THREE)
        try:
            bed.sidestep.kill()
        finally:
            _stop_load(bed, ONE)
    yield Check("no request fails while agents are killed", equals(lambda: _failures(asking.result()), {}))
    yield from _all_enabled(bed, "with new agents")
    yield Check(f"{ONE} reaches {THREE} by both", _passes(bed, ztunnel, ONE, THREE, [OUTBOUND, INBOUND]))


def _of_replacement(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """By a rollout, in which one always listens."""
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(_load, bed, ONE, THREE)
        try:
            ztunnel.replace()
        finally:
            _stop_load(bed, ONE)
    yield Check("no request fails while ztunnels are replaced", equals(lambda: _failures(asking.result()), {}))
    yield from _all_enabled(bed, "by new ztunnels")
    yield Check(f"{ONE} reaches {THREE} by the new ones", _passes(bed, ztunnel, ONE, THREE, [OUTBOUND, INBOUND]))


def _of_kills(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """While none listens, requests are refused; none gets past."""
    with ThreadPoolExecutor() as pool:
        before = len(_passing(ztunnel.seen(), OUTBOUND, bed.pods.ip(ONE)))
        asking = pool.submit(_load, bed, ONE, THREE)
        try:
            ztunnel.kill()
            wait_until(lambda: _redirection(bed, ONE) == ENABLED, "it to be enabled", _SECONDS)
        finally:
            _stop_load(bed, ONE)
    found = asking.result()
    answered = sum(found.values()) - sum(_failures(found).values())
    both = [*ztunnel.seen_before_kill(), *ztunnel.seen()]
    passed = len(_passing(both, OUTBOUND, bed.pods.ip(ONE))) - before
    bypassed = max(0, answered - passed)
    yield Check("requests are refused while ztunnels are killed", equals(lambda: _REFUSED in found, True))
    yield Check(f"none of {answered} answers has got past ztunnel", equals(lambda: bypassed, 0))
    yield from _all_enabled(bed, "by ztunnels that were killed")
    yield Check(f"{ONE} reaches {THREE} by both again", _passes(bed, ztunnel, ONE, THREE, [OUTBOUND, INBOUND]))


def _of_absence(bed: Bed, ztunnel: Ztunnel) -> Iterator[Check]:
    """On one node there is none; pods there are closed, and kubelet still finds them ready."""
    node = bed.cluster.nodes[0]
    ztunnel.leave(node.name)
    refused = {_REFUSED: 1}
    for client, target in ((ONE, TWO), (ONE, OUT), (OUT, ONE)):
        asked = partial(_asked, bed, client, bed.pods.ip(target))
        yield Check(f"without a ztunnel {client} does not reach {target}", equals(asked, refused))
    place = f"http://{bed.pods.ip(ONE)}:{server.HTTP}/"
    yield Check("nor does another process of the host", equals(lambda: _elsewhere(node.host, place), ""))
    yield Check(f"{PLAIN[1]} reaches {THREE}", equals(partial(_server_told, bed, PLAIN[1], THREE), THREE.name))
    for pod in (ONE, TWO):
        yield Check(f"{pod} is {PENDING}", soon(equals(partial(_redirection, bed, pod), PENDING), _SECONDS))
        yield Check("an Event says why", soon(partial(_lacks_event, bed, pod)))
        yield Check(f"kubelet finds {pod} ready", equals(partial(_is_ready, bed, pod), True))
    yield Check("istiod has by HBONE what is enabled", soon(equals(lambda: set(_by_hbone(bed)), {THREE})))
    ztunnel.come_back()
    yield from _all_enabled(bed, "by a ztunnel that comes back")
    yield Check(f"{ONE} reaches {TWO} by both again", _passes(bed, ztunnel, ONE, TWO, [OUTBOUND, INBOUND]))


def _all_enabled(bed: Bed, how: str) -> Iterator[Check]:
    enabled = [(pod, soon(equals(partial(_redirection, bed, pod), ENABLED), _SECONDS)) for pod in MEMBERS]
    yield from at_once(Check(f"{pod} is {ENABLED} {how}", look) for pod, look in enabled)
    yield Check("istiod has them by HBONE", soon(equals(lambda: set(_by_hbone(bed)), set(MEMBERS))))


def _make(
    bed: Bed, pod: PodName, node: str, labels: dict[str, str] | None = None, probe: dict[str, Any] | None = None
) -> None:
    container = python("app", server.__file__, probed=server.HTTP)
    if probe:
        container["readinessProbe"] = probe
    made = pod_of(pod, node, container, {})
    made["metadata"]["labels"] = {**made["metadata"]["labels"], **(labels or {})}
    bed.control.apply(*account_and_service(pod, {"http": server.HTTP}), made)


def _label(bed: Bed, what: str, label: str, namespace: str = "") -> None:
    where = ["-n", namespace] if namespace else []
    bed.control.kubectl("label", "--overwrite", *where, what, label)


def _redirection(bed: Bed, pod: PodName) -> str | None:
    found: str | None = bed.pods.get(pod)["metadata"].get("annotations", {}).get(REDIRECTION)
    return found


def _is_ready(bed: Bed, pod: PodName) -> bool:
    return is_ready(bed.pods.get(pod))


def _lacks_event(bed: Bed, pod: PodName) -> str:
    """What the Pod's Events say if none says that there is no ztunnel; "" if one does."""
    chosen = f"--field-selector=reason=AmbientPending,involvedObject.name={pod.name}"
    found = [each.get("message", "") for each in bed.control.get("events", "-n", pod.namespace, chosen) or ()]
    return "" if any("no ztunnel is connected" in each for each in found) else f"the Events are {found}"


def _by_hbone(bed: Bed) -> dict[PodName, str]:
    """The Pods to which istiod has others send by HBONE, and their addresses."""
    (istiod,) = bed.control.get(
        "pods", "-n", mesh.NAMESPACE, "-l", "app=istiod", "--field-selector=status.phase=Running"
    )
    asked = ["exec", "-n", mesh.NAMESPACE, istiod["metadata"]["name"], "--", "/usr/local/bin/pilot-discovery"]
    told = json.loads(bed.control.kubectl(*asked, "request", "GET", "/debug/ambientz"))
    found = [each for each in told["workloads"] if each.get("tunnelProtocol") == "HBONE"]
    return {
        PodName(each["namespace"], each["name"]): bed.pods.ip(PodName(each["namespace"], each["name"]))
        for each in found
    }


def _is_accepted(bed: Bed, ztunnel: Ztunnel, pod: PodName) -> bool:
    uid = bed.pods.get(pod)["metadata"]["uid"]
    return any(each["who"] == "zds" and each["uid"] == uid and not each["refusal"] for each in ztunnel.seen())


def _passes(bed: Bed, ztunnel: Ztunnel, client: PodName, target: PodName, ways: Sequence[str]) -> Callable[[], str]:
    """A request comes by these ports of doubles, and the application sees the client's address."""
    source, to = bed.pods.ip(client), bed.pods.ip(target)

    def passed() -> list[str]:
        found = (each for each in ztunnel.seen() if each["who"] != "zds" and each["peer"][0] == source)
        return [each["who"] for each in found if to in (each["local"][0], (each["original"] or each["local"])[0])]

    def look() -> str:
        before = passed()
        asked = _asked(bed, client, to)
        if asked != {f"{target.name} {source}": 1}:
            return str(asked)
        after = passed()
        fresh = sorted(after, key=str)
        for each in before:
            fresh.remove(each)
        return "" if fresh == sorted(ways) else f"it came by {fresh}"

    return soon(look)


def _asked(bed: Bed, client: PodName, host: str) -> dict[str, int]:
    """Who has answered one request and whom it saw, or how the client failed."""
    told = bed.pods.run(client, PYTHON, "-c", _ASK, host, str(server.HTTP))
    return dict(json.loads(told))


def _server_told(bed: Bed, client: PodName, target: PodName) -> str:
    """Who answers a client that has no Python."""
    url = f"http://{bed.pods.ip(target)}:{server.HTTP}/"
    try:
        return str(json.loads(bed.pods.run(client, "timeout", "10", "wget", "-q", "-O", "-", url))["server"])
    except CommandFailed as error:
        return str(error)


def _load(bed: Bed, client: PodName, target: PodName) -> dict[str, int]:
    """Ask again and again until _stop_load(); how often who has answered and how often it has failed how."""
    told = bed.pods.run(client, PYTHON, "-c", _ASK, bed.pods.ip(target), str(server.HTTP), "load")
    return dict(json.loads(told))


def _stop_load(bed: Bed, client: PodName) -> None:
    bed.pods.run(client, "touch", "/tmp/stop")


def _failures(found: dict[str, int]) -> dict[str, int]:
    return {words: times for words, times in found.items() if not words.startswith(f"{THREE.name} ")}


def _passing(seen: list[dict[str, Any]], way: str, source: str) -> list[dict[str, Any]]:
    return [each for each in seen if each["who"] == way and each["peer"][0] == source]


def _from_outside(bed: Bed, ztunnel: Ztunnel) -> set[str]:
    """The pods to which somebody who is no pod has come by the double."""
    pods = {bed.pods.ip(pod) for pod in (*MEMBERS, OUT, CLIENT, *PLAIN)}
    inbound = (each for each in ztunnel.seen() if each["who"] == INBOUND)
    return {each["local"][0] for each in inbound if each["peer"][0] not in pods}


def _elsewhere(host: Any, url: str) -> str:
    """What a process of the host gets that is not in kubelet's cgroup; "" if it does not get there."""
    root = "$(awk '$3 == \"cgroup2\" {print $2; exit}' /proc/mounts)"
    moved = f"mkdir -p {root}/elsewhere && echo $$ > {root}/elsewhere/cgroup.procs"
    try:
        return str(host.run(["sh", "-c", f"{moved} && exec curl -s --max-time 10 {url}"]))
    except CommandFailed:
        return ""
