"""A walk as plain values, and as text for people: the verdict, then a line for each step."""

from typing import Any

from cni.netns.proc_net import endpoint
from installer.commands.explain.explanation import shown_annotation
from installer.commands.explain.walk import Walk
from installer.verdict.verdict import State

_MARKS = {State.OK: "✓", State.WRONG: "✗", State.UNKNOWN: "?", State.NOTE: "·"}


def walk_document(client: str, server: str, found: Walk) -> dict[str, Any]:
    """The document that is printed."""
    return {
        "client": client,
        "server": server,
        "destination": str(found.to),
        "port": found.port,
        "protocol": found.first.asked.protocol,
        "state": str(found.state),
        "headline": found.headline,
        "steps": [each.document() for each in found.steps],
    }


def walk_text(document: dict[str, Any]) -> str:
    """The document as text for people."""
    from installer.commands.printing import line, rendered

    to = endpoint(document["destination"], document["port"])
    lines = [line(f"{document['client']} → {document['server']}, {to} ({document['protocol'].upper()})")]
    lines.append(line(document["headline"]))
    width = max(len(each["who"]) for each in document["steps"])
    for each in document["steps"]:
        indent = " " * (width + 4)
        lines.append(line(each["what"], f"{_MARKS[State(each['state'])]} {each['who'].ljust(width)}  ", indent))
        if cause := each["annotation"]:
            lines.append(line(shown_annotation(cause), f"{indent}annotation ", indent))
    if tried := document.get("try"):
        agreed = "as explained" if tried["agrees"] else f"NOT as explained: {tried['differs']}"
        mark = _MARKS[State.OK if tried["agrees"] else State.WRONG]
        lines.append(line(f"{tried['happened']}; {agreed}", f"{mark} {'tried'.ljust(width)}  ", " " * (width + 4)))
    return rendered(*lines)


def exit_status(document: dict[str, Any]) -> int:
    """0 if nothing is wrong, 1 if something is or the connection went another way, 3 if something can't be told."""
    if not document.get("try", {"agrees": True})["agrees"]:
        return 1
    return {"ok": 0, "wrong": 1}.get(document["state"], 3)
