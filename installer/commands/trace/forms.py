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
            who = "proxy" if document["is_proxy"] else document["process"]
            what = f"{who} ({document['pid']}) → {_place(document, 'destination')} {_outcome(document)}"
        case "inbound":
            what = f"{_place(document, 'source')} → {document['destination']} {_outcome(document)}"
        case unknown:
            what = unknown
    return f"{clock} {pod}: {what}\n"


def _outcome(document: Document) -> str:
    to = f", to {document['listener']}" if document["listener"] else ""
    became = f": {document['outcome']}" if document["outcome"] else ""
    why = f": {document['why']}" if document["why"] and document["verdict"] not in ("denied", "unreachable") else ""
    rule = f" ({document['rule']}{why})" if document["rule"] else ""
    return f"{document['protocol']}: {document['direction']} {document['verdict']}{to}{became}{rule}"


def _place(document: Document, end: str) -> str:
    """An end of the connection: the pod that has the address, or the address alone."""
    pod = document[f"{end}_pod"]
    return f"{pod} ({document[end]})" if pod else str(document[end])


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
