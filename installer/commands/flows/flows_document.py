"""What pods' connections carry, and with whom, as plain values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bpf.layout import Cookie, FlowWay, PodFlags, TrafficEntry
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.flows import Carried, Flow, PodFlows, flows_of
from cni.netns.proc_net import endpoint
from installer.commands.names import NoSuchPod
from installer.commands.pods import enrolled_pods
from installer.commands.pods.enrolled_pods import EnrolledPod
from installer.commands.sampling.figures import size


def flows_documents(pins: Pins, proc: Path, namespace: str = "") -> list[dict[str, Any]]:
    """A document for each enrolled pod, of this namespace if one is given. Raises NotAttached."""
    looking = pins.look_only()
    with Tables(looking) as tables:
        pods = [each for each in enrolled_pods.every(pins, tables) if namespace in ("", each.identity.namespace)]
        return list(_documents(looking, tables, pods, proc))


def flows_document(pins: Pins, proc: Path, name: str) -> dict[str, Any]:
    """The document of the pod called NAME or NAMESPACE/NAME. Raises NoSuchPod, NotAttached."""
    looking = pins.look_only()
    with Tables(looking) as tables:
        pod = enrolled_pods.find_pod(pins, tables, name)
        for document in _documents(looking, tables, [pod], proc):
            return document
    raise NoSuchPod(f"{name} has gone just now")


def _documents(pins: Pins, tables: Tables, pods: list[EnrolledPod], proc: Path) -> Iterator[dict[str, Any]]:
    found = flows_of(pins, tables, [pod.cookie for pod in pods], proc)
    for pod in pods:
        flows = found.get(pod.cookie)
        if flows is None:
            continue  # it has gone just now
        past_tcp = (tables.traffic.get(Cookie(pod.cookie)) or TrafficEntry()).redirected_bytes
        yield {
            "pod": str(pod.identity),
            "namespace": pod.identity.namespace,
            "name": pod.identity.name,
            "outbound": _carried(flows.outbound, flows),
            "inbound": _carried(flows.inbound, flows),
            "flows": [_row(each, flows) for each in flows.flows],
            "forgotten": flows.forgotten,
            "dropped": flows.dropped,
            "accelerated_bytes": past_tcp,
            "not_told": list(_not_told(pod, flows, past_tcp)),
        }


def _row(flow: Flow, pod: PodFlows) -> dict[str, Any]:
    is_inbound = flow.way is FlowWay.INBOUND
    return {
        "direction": "inbound" if is_inbound else "outbound",
        "verdict": None if is_inbound else flow.way.name.lower(),
        "address": str(flow.address) if flow.address else None,
        "port": flow.port,
        "peer": endpoint(flow.address, flow.port) if flow.address else f"port {flow.port}",
        **_carried(flow.carried, pod),
    }


def _carried(of: Carried, pod: PodFlows) -> dict[str, Any]:
    """Times in seconds. If open connections can't be seen, it is not known how many there are."""
    return {
        "open": None if pod.unseen else of.open,
        "closed": of.closed,
        "sent_bytes": of.sent,
        "received_bytes": of.received,
        "retransmits": of.retransmits,
        "rtt_seconds": of.rtt,
        "duration_seconds": of.duration,
        "last_closed": of.last_closed.isoformat(timespec="seconds") if of.last_closed else None,
    }


def _not_told(pod: EnrolledPod, flows: PodFlows, past_tcp: int) -> Iterator[str]:
    """What these counts can't have, a sentence each."""
    if PodFlags.SHADOW in pod.flags:
        yield "connections since it is a shadow pod: Istio's rules capture it"
    if flows.unseen:
        yield f"connections that are open: {flows.unseen}"
    if past_tcp:
        yield f"{size(past_tcp)} that the pod has sent past TCP (acceleration), and what it has got in the same way"
    if pod.identity.is_adopted:
        yield "connections from before the pod was enrolled, which was when it ran already"
    if flows.dropped:
        yield f"whom {flows.dropped} closed connections were with: the sums have them, but the pod had too many others"
    if flows.forgotten:
        yield f"{flows.forgotten} destinations that were longest ago: the list has the latest, the sums have all"
