"""The content of the page as plain values for programs."""

from collections.abc import Mapping
from typing import Any

from installer.commands.report.view import NodeView
from installer.commands.sampling.flows import Flow, FlowEnd
from installer.commands.sampling.sample import Counts

Plain = dict[str, Any]


def report_document(view: NodeView) -> Plain:
    """The document. Totals are since the maps were made. Rates are per second while the node was observed."""
    sample = view.sample
    return {
        "node": view.name,
        "verdict": view.verdict.document(),
        "about": list(view.about),
        "kernel": view.kernel,
        "taken": view.taken.isoformat(timespec="seconds"),
        "seconds": round(view.rates.seconds, 3),
        "attached": sample.attached,
        "acceleration": {
            "level": str(sample.level.level),
            "wanted": str(sample.level.wanted),
            "reason": sample.level.reason,
            "share": sample.total.share,
        },
        "total": _counts(sample.total),
        "rates": _counts(view.rates.total),
        "pods": [_pod(view, cookie) for cookie in _by_name(view)],
        "flows": [_flow(flow, _names(view)) for flow in view.flows],
        "maps": [
            {"name": fill.name, "entries": fill.entries, "limit": fill.limit, "share": fill.share}
            for fill in view.fills
        ],
        "unseen": {_names(view).get(cookie, str(cookie)): why for cookie, why in view.unseen.items()},
        "blind": view.blind,
        "refused_pods": view.refused.document(),
        "coverage": list(view.coverage),
        "carried": list(view.carried),
    }


def _names(view: NodeView) -> dict[int, str]:
    return {cookie: str(pod.identity) for cookie, pod in view.sample.pods.items()}


def _by_name(view: NodeView) -> list[int]:
    names = _names(view)
    return sorted(names, key=names.__getitem__)


def _pod(view: NodeView, cookie: int) -> Plain:
    pod, inside = view.sample.pods[cookie], view.inside.get(cookie)
    return {
        "pod": str(pod.identity),
        "state": pod.state,
        "addresses": [str(ip) for ip in pod.addresses],
        "level": str(pod.level),
        "is_proxy_listening": pod.listening,
        "steering": str(pod.steering),
        "processes": pod.processes.document(),
        "total": _counts(pod.counts),
        "rates": _counts(view.rates.pods[cookie]),
        "inside": None if inside is None else vars(inside),
    }


def _counts(counts: Counts) -> Plain:
    """Connections by direction and verdict; messages on accelerated connections by outcome."""
    connections: dict[str, Plain] = {}
    for (direction, verdict), count in counts.connections.items():
        connections.setdefault(direction, {})[verdict] = count
    return {"connections": connections, "messages": dict(counts.messages)}


def _flow(flow: Flow, names: Mapping[int, str]) -> Plain:
    client, server = flow.way
    return {
        "source": _place(flow.source, names),
        "target": _place(flow.target, names),
        "client": client,
        "server": server,
        "ports": dict(flow.ports),
        "open": flow.alive,
        "ended": flow.ended,
        "accelerated": flow.accelerated,
        "opened_per_second": flow.opened,
        "bytes_per_second": flow.rate,
    }


def _place(place: FlowEnd, names: Mapping[int, str]) -> Plain:
    """A pod of this node or an address. The other one is None; both are if nobody knows who it was."""
    if place.cookie is None:
        return {"pod": None, "address": str(place.ip) if place.ip else None}
    return {"pod": names.get(place.cookie), "address": None}
