"""How events are written: a line for people, an object a line for pipes, or YAML documents."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from installer.commands.trace.told_events import Document, Reader, Told


@dataclass(frozen=True)
class Form:
    """One of them: what is printed of an event, and of how many were lost (which standard error is always told)."""

    event: Callable[[Reader, Told], str]
    lost: Callable[[int], str]


def line_of(document: Document) -> str:
    """One event for people."""
    clock, pod = document["time"][11:23], document["pod"]
    match document["event"]:
        case "killed":
            sender = f" by process {document['sender']}" if document["sender"] else ""
            what = f"{document['process']} ({document['pid']}) was killed{sender}: {document['signal']}"
        case "listening":
            what = f"the proxy listens on {document['destination']}"
        case "closed":
            what = f"the proxy does not listen on {document['destination']} any more"
        case "connect":
            what = f"{document['process']} ({document['pid']}) → {document['destination']} {_outcome(document)}"
        case "inbound":
            what = f"{document['source']} → {document['destination']} {_outcome(document)}"
        case unknown:
            what = unknown
    return f"{clock} {pod}: {what}"


def _outcome(document: Document) -> str:
    to = f", to {document['listener']}" if document["listener"] else ""
    rule = f", {document['rule']}" if document["rule"] else ""
    return f"{document['protocol']}: {document['direction']} {document['verdict']}{to}{rule}"


def yaml_of(document: Document) -> str:
    """A document without a list or mapping in it, several times as fast as PyYAML: scalars of JSON are YAML's too."""
    return "\n".join(("---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in document.items())))


def _lost(count: int) -> Document:
    return {"event": "lost", "count": count}


FORMS = {
    "table": Form(lambda reader, event: line_of(reader.read(event)), lambda _: ""),
    "json": Form(lambda reader, event: reader.json(event), lambda count: json.dumps(_lost(count))),
    "yaml": Form(lambda reader, event: yaml_of(reader.read(event)), lambda count: yaml_of(_lost(count))),
}
