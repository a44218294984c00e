"""Writes events: one line each for people, one JSON object a line for programs, or YAML documents."""

import json
from collections.abc import Callable

from installer.commands.output import yaml_of
from installer.commands.trace.told_events import Document

# json.dumps() would make a new encoder for each document, which takes longer than encoding the document
_encode = json.JSONEncoder(ensure_ascii=False).encode


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
    return f"{clock} {pod}: {what}\n"


def _outcome(document: Document) -> str:
    to = f", to {document['listener']}" if document["listener"] else ""
    rule = f", {document['rule']}" if document["rule"] else ""
    return f"{document['protocol']}: {document['direction']} {document['verdict']}{to}{rule}"


def _json_line(document: Document) -> str:
    return _encode(document) + "\n"


def _yaml_document(document: Document) -> str:
    return f"---\n{yaml_of(document)}"


# value of --output → how an event is written
FORMS: dict[str, Callable[[Document], str]] = {
    "table": line_of,
    "wide": line_of,
    "json": _json_line,
    "jsonl": _json_line,
    "yaml": _yaml_document,
}
