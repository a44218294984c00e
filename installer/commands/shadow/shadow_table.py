"""The texts of `sidestep shadow` for people."""

from typing import Any

from rich.console import RenderableType

from bpf.layout import Uncompared
from installer.commands.printing import line, rendered, table
from installer.commands.shadow.shadow_document import ENDED_PODS, REASONS

_TEXTS = (
    "NAMESPACE",
    "NAME",
    "VERDICT",
    "SINCE",
    "POD",
    "PEER",
    "PROTOCOL",
    "SIDESTEP",
    "RULE",
    "NETFILTER",
    "PROCESS",
)
_NONE = (
    "no shadow pods: either the agent runs without --shadow, or no pod with a sidecar here has Istio's netfilter rules"
)


def shadow_text(documents: list[dict[str, Any]], has_titles: bool) -> str:
    """A row for each pod, then a row for each kind of difference, then what could not be compared."""
    if not documents and has_titles:
        return f"{_NONE}\n"
    titles = ("NAMESPACE", "NAME", "VERDICT", "SAME", "DIFFERENT", "NOT COMPARED", "SINCE")
    rows = (
        (
            each["namespace"] or None,
            each["name"],
            each["verdict"],
            each["same"],
            each["different"],
            each["not_compared"],
            each["since"],
        )
        for each in documents
    )
    parts: list[RenderableType] = [table(titles, rows, _TEXTS, has_titles)]
    differences = [(each["pod"], one) for each in documents for one in each["differences"]]
    if differences:
        columns = ("POD", "PEER", "PROTOCOL", "SIDESTEP", "RULE", "NETFILTER", "COUNT", "PROCESS")
        parts.append(table(columns, (_row(*each) for each in differences), _TEXTS, has_titles))
    if has_titles:
        parts += [line(each) for each in _notes(documents)]
    return rendered(*parts)


def _row(pod: str, each: dict[str, Any]) -> tuple[Any, ...]:
    process = each["process"]
    who = None if process is None else f"{process['command'] or process['pid'] or 'unknown'} (uid {process['uid']})"
    told = (each["peer"], each["protocol"], each["sidestep"], each["rule"], each["netfilter"], each["count"])
    return pod, *told, who


def _notes(documents: list[dict[str, Any]]) -> list[str]:
    reasons: dict[str, int] = {}
    for each in documents:
        for reason, count in each["not_compared_because"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    notes = [f"not compared: {count}: {REASONS[Uncompared[reason.upper()]]}" for reason, count in reasons.items()]
    if unknown := [each["pod"] for each in documents if each["verdict"] == "unknown"]:
        notes.append(f"unknown, as nothing was compared yet: {', '.join(unknown)}")
    if any(each["name"] == ENDED_PODS for each in documents):
        notes.append(f"{ENDED_PODS}: all pods that have ended, or were let go, since the first was watched")
    return notes
