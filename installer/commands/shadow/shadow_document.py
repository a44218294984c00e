"""What was compared of each shadow pod, as plain values; read from the maps alone."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from bpf.layout import RULES, Cookie, FindingEntry, FindingKey, PodFlags, ShadowSumsEntry, Uncompared, Way
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.enrolment.shadows import ENDED, VERDICTS, netfilters
from cni.netns.proc_net import endpoint
from installer.commands.names import NoSuchPod, cookie_of

# the row of the pods that have ended, or are shadows no more
ENDED_PODS = "(ended)"
_PROTOCOLS = {6: "tcp", 17: "udp"}
REASONS = {
    Uncompared.NO_ENTRY: "conntrack knows nothing of them: nobody answered, or they are older than ten seconds",
    Uncompared.TPROXY: "TPROXY leaves no trace of an inbound connection in conntrack",
    Uncompared.UNSEEN: "the pod's namespace or its conntrack could not be looked at",
    Uncompared.UNNAMED: "DNS queries of connected UDP sockets, whose ports the programs are not told",
    Uncompared.DROPPED: "there were too many at once",
}


def shadow_documents(pins: Pins, namespace: str = "") -> list[dict[str, Any]]:
    """A document for each shadow pod, of this namespace if one is given, and one for those that have ended.

    Raises NotAttached.
    """
    with Tables(pins.look_only()) as tables:
        pods = {key.cookie: pod for key, pod in tables.pods.every() if PodFlags(pod.flags) & PodFlags.SHADOW}
        names = {cookie: Identity.of(pod) for cookie, pod in pods.items()}
        chosen = {cookie: each for cookie, each in names.items() if namespace in ("", each.namespace)}
        documents = _documents(tables, chosen)
        documents.sort(key=lambda each: str(each["pod"]))
        if not namespace and tables.shadow_sums.get(Cookie(ENDED)):
            documents += _documents(tables, {ENDED: Identity("", ENDED_PODS, "", "", "", "")})
        return documents


def shadow_document(pins: Pins, name: str) -> dict[str, Any]:
    """The document of the pod called NAME or NAMESPACE/NAME. Raises NoSuchPod, NotAttached."""
    with Tables(pins.look_only()) as tables:
        cookie = cookie_of(tables, name)
        pod = tables.pods.get(Cookie(cookie))
        if pod is None:
            raise NoSuchPod(f"{name} has gone just now")
        if not PodFlags(pod.flags) & PodFlags.SHADOW:
            raise NoSuchPod(f"{name} is no shadow pod: sidestep captures it")
        return _documents(tables, {cookie: Identity.of(pod)})[0]


def exit_status(documents: Iterable[dict[str, Any]]) -> int:
    """0 if there is no difference, 1 if there is one, 3 if nothing was compared."""
    verdicts = {each["verdict"] for each in documents}
    if "different" in verdicts:
        return 1
    return 0 if "same" in verdicts else 3


def _documents(tables: Tables, names: dict[int, Identity]) -> list[dict[str, Any]]:
    now = datetime.now(UTC) - timedelta(microseconds=time.monotonic_ns() / 1000)
    found: dict[int, list[dict[str, Any]]] = {}
    for key, value in tables.findings.every():
        if key.cookie in names:
            found.setdefault(key.cookie, []).append(_difference(key, value, now))
    documents = []
    for cookie, identity in names.items():
        sums = tables.shadow_sums.get(Cookie(cookie))
        differences = sorted(found.get(cookie, []), key=lambda each: str(each["last"]), reverse=True)
        documents.append(_document(identity, sums or ShadowSumsEntry(), differences, now))
    return documents


def _document(
    identity: Identity, sums: ShadowSumsEntry, differences: list[dict[str, Any]], epoch: datetime
) -> dict[str, Any]:
    counts = {each.name.lower(): sums.not_compared[each] for each in Uncompared}
    verdict = "different" if sums.different else "same" if sums.same else "unknown"
    return {
        "pod": str(identity) if identity.namespace else identity.name,
        "namespace": identity.namespace,
        "name": identity.name,
        "verdict": verdict,
        "since": _time(sums.since, epoch),
        "last": _time(sums.last, epoch),
        "same": sums.same,
        "different": sums.different,
        "not_compared": sum(counts.values()),
        "not_compared_because": {reason: count for reason, count in counts.items() if count},
        "differences": differences,
    }


def _difference(key: FindingKey, value: FindingEntry, epoch: datetime) -> dict[str, Any]:
    way, remote = Way(key.way), key.remote.ip()
    process = {"pid": value.pid, "uid": value.uid, "command": value.command.decode(errors="replace")}
    return {
        "way": way.name.lower(),
        "protocol": _PROTOCOLS.get(key.protocol, str(key.protocol)),
        "address": str(remote),
        "port": key.port,
        "peer": endpoint(remote, key.port) if way is Way.OUT else f"from {remote} to port {key.port}",
        "sidestep": VERDICTS[key.verdict] if key.verdict < len(VERDICTS) else str(key.verdict),
        "rule": RULES[key.rule] if key.rule < len(RULES) else "",
        "netfilter": netfilters(key.went_to),
        "count": value.count,
        "first": _time(value.first, epoch),
        "last": _time(value.last, epoch),
        "process": process if way is Way.OUT else None,
    }


def _time(nanoseconds: int, epoch: datetime) -> str | None:
    if not nanoseconds:
        return None
    return (epoch + timedelta(microseconds=nanoseconds / 1000)).isoformat(timespec="seconds")
