"""How much of the pods' traffic is captured, and what is not, as plain values; read from the maps alone."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bpf.layout import TOTALS, Cookie, PodFlags, TallyEntry, Way
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.steered import Steering, steering_of
from cni.enrolment.strays import PodProcesses, processes_of
from cni.enrolment.uncaptured import Sums, Uncaptured, listed, sums_of
from installer.commands.coverage.reasons import ambient_annotation_behind, ambient_reason, annotation_behind, reason
from installer.commands.names import NoSuchPod
from installer.commands.pods import enrolled_pods
from installer.commands.pods.differences import ambient_of
from installer.commands.pods.enrolled_pods import EnrolledPod
from installer.commands.pods.policy_words import ambient_words, annotations_of, proxy_of

# what a proxy calls in its own pod goes to the proxy, but never came from outside
_INSIDE = "self"


def coverage_documents(pins: Pins, proc: Path, namespace: str = "") -> list[dict[str, Any]]:
    """A document for each enrolled pod, of this namespace if one is given. Raises NotAttached."""
    with Tables(pins.look_only()) as tables:
        pods = [each for each in enrolled_pods.every(pins, tables) if namespace in ("", each.identity.namespace)]
        return list(_documents(pins, tables, pods, proc))


def coverage_document(pins: Pins, proc: Path, name: str) -> dict[str, Any]:
    """The document of the pod called NAME or NAMESPACE/NAME. Raises NoSuchPod, NotAttached."""
    with Tables(pins.look_only()) as tables:
        for document in _documents(pins, tables, [enrolled_pods.find_pod(pins, tables, name)], proc):
            return document
        raise NoSuchPod(f"{name} has gone just now")


def _documents(pins: Pins, tables: Tables, pods: list[EnrolledPod], proc: Path) -> Iterator[dict[str, Any]]:
    cookies = [pod.cookie for pod in pods]
    every = listed(tables, set(cookies))
    steering, processes = steering_of(pins, tables, cookies, proc), processes_of(pins, cookies, proc)
    for pod in pods:
        sums = sums_of(tables, pod.cookie)
        if sums is None:
            continue  # it has gone just now
        entries = every.get(pod.cookie, [])
        tally = tables.tallies.get(Cookie(pod.cookie)) or TallyEntry()
        captured = _captured(tally)
        seen = captured + sums.past
        yield {
            "pod": str(pod.identity),
            "namespace": pod.identity.namespace,
            "name": pod.identity.name,
            "on_uncaptured": pod.policy.uncaptured,
            "covered": captured / seen if seen else None,
            "captured": captured,
            "past": sums.past,
            "refused": sums.refused,
            "past_the_proxy": [_row(pod, each) for each in entries if not each.is_refused],
            "refusals": [_row(pod, each) for each in entries if each.is_refused],
            "forgotten": sums.forgotten,
            "dropped": sums.dropped,
            "not_told": list(_not_told(pod, steering[pod.cookie], processes[pod.cookie], sums)),
        }


def _captured(tally: TallyEntry) -> int:
    """Connections, and datagrams to nameservers, that the proxy got from or for the network."""
    counts: Iterable[tuple[tuple[str, str], int]] = zip(TOTALS, tally.connections, strict=True)
    return sum(count for (direction, verdict), count in counts if verdict == "captured" and direction != _INSIDE)


def _row(pod: EnrolledPod, each: Uncaptured) -> dict[str, Any]:
    if ambient := ambient_of(pod):
        why, name, words = ambient_reason(each), ambient_annotation_behind(each), ambient_words(ambient)
    else:
        words = annotations_of(pod.policy) | proxy_of(pod.policy)
        why, name = reason(each), annotation_behind(each)
    has_process = each.way is not Way.IN
    return {
        "way": each.way.name.lower(),
        "address": str(each.address) if each.address else None,
        "port": each.port if each.address else None,
        "peer": each.peer,
        "protocol": each.protocol,
        "count": each.count,
        "rule": each.rule,
        "why": why,
        "annotation": {"name": name, "value": words.get(name)} if name else None,
        "process": {"pid": each.pid, "uid": each.uid, "command": each.command} if has_process else None,
        "first": each.first.isoformat(timespec="seconds"),
        "last": each.last.isoformat(timespec="seconds"),
    }


def _not_told(pod: EnrolledPod, steering: Steering, processes: PodProcesses, sums: Sums) -> Iterator[str]:
    """What these counts can't have, a sentence each."""
    if PodFlags.SHADOW in pod.flags:
        yield "anything since it is a shadow pod: Istio's rules capture it, and `sidestep shadow` compares"
    if steering is not Steering.STEERED:
        yield f"inbound: {steering.words}"
    if processes.strays:
        names = ", ".join(sorted({each.name for each in processes.strays}))
        yield f"what these processes send, which run outside of the pod's cgroups: {names}"
    if processes.unknown:
        yield f"whether the pod has processes outside of its cgroups: {processes.unknown}"
    if pod.identity.is_adopted:
        yield "connections from before the pod was enrolled, which was when it ran already"
    if sums.dropped:
        yield f"where {sums.dropped} went or came from: they are counted, but the pod had too many others"
    if sums.forgotten:
        yield f"{sums.forgotten} remote ends that were longest ago: the list has the latest"
