"""Events of the programs as plain values and as lines, and which of them somebody wants to see."""

import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from signal import Signals
from typing import Any, NamedTuple

from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, RULES, TOTALS, Address, EventKind

Document = dict[str, Any]
Network = IPv4Network | IPv6Network

_PROTOCOLS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}
_RESOLVER_PORT = 15053
# what a captured connection arrives at, by direction
_LISTENERS = {"outbound": OUTBOUND_PORT, "self": INBOUND_PORT, "inbound": INBOUND_PORT, "dns": _RESOLVER_PORT}


class BadFilter(SidestepError):
    """What should be shown was not said in a way that can be understood."""


@dataclass(frozen=True)
class Wanted:
    """Which events are shown; None for any. `port` in host order."""

    network: Network | None = None
    port: int | None = None
    verdict: str | None = None

    @classmethod
    def of(cls, destination: str | None, verdict: str | None) -> "Wanted":
        """From the command line: `10.0.0.0/8`, `10.1.2.3:80`, `[fd00::1]:80` or `:80`. Raises BadFilter."""
        if not destination:
            return cls(verdict=verdict)
        host, port = destination, ""
        if destination.startswith("[") or destination.count(":") == 1:
            host, _, port = destination.rpartition(":")
        try:
            network = ip_network(host.strip("[]")) if host else None
            number = int(port) if port else None
        except ValueError:
            raise BadFilter(
                f'"{destination}" is no destination; give 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80'
            ) from None
        return cls(network, number, verdict)

    def takes(self, event: "Told") -> bool:
        """Whether an event is one of them. Beginnings and ends of listeners and processes have no verdict."""
        if self.verdict and (event.kind > EventKind.INBOUND or TOTALS[event.verdict][1] != self.verdict):
            return False
        if self.port is not None and event.destination_port != self.port:
            return False
        return self.network is None or Address.from_buffer_copy(event.destination).ip() in self.network


class Told(NamedTuple):
    """An event as it comes, in the order of struct event; ports in host order."""

    time: int
    cookie: int
    kind: int
    verdict: int
    rule: int
    protocol: int
    pid: int
    uid: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    command: bytes
    signal: int
    sender: int
    zero: int


_EVENT = struct.Struct("=QQIIIIII16s16sHH16sIII")


def told(raw: bytes) -> Told:
    """The fields of an event's bytes."""
    return Told._make(_EVENT.unpack(raw))


class Reader:
    """Makes documents of events; knows pods by their cookies."""

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self._name_of = name_of
        self._zero = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def read(self, event: Told) -> Document:
        """An event in plain values."""
        kind = EventKind(event.kind)
        document: Document = {
            "time": _time(self._zero + event.time),
            "pod": self._name_of(event.cookie),
            "event": kind.name.lower(),
        }
        if kind is EventKind.KILLED:
            return document | {
                "process": _text(event.command),
                "pid": event.pid,
                "uid": event.uid,
                "signal": _signal(event.signal),
                "sender": event.sender or None,
            }
        document["destination"] = _endpoint(event.destination, event.destination_port)
        if kind in (EventKind.LISTENING, EventKind.CLOSED):
            return document
        direction, verdict = TOTALS[event.verdict]
        document |= {
            "source": _endpoint(event.source, event.source_port),
            "protocol": _PROTOCOLS.get(event.protocol, str(event.protocol)),
            "direction": direction,
            "verdict": verdict,
            "rule": RULES[event.rule],
            "listener": _LISTENERS[direction] if verdict == "captured" else None,
        }
        if kind is EventKind.CONNECT:
            document |= {"process": _text(event.command), "pid": event.pid, "uid": event.uid}
        return document

    def json(self, event: Told) -> str:
        """The document as JSON, several times as fast for the events that come by the thousand."""
        if event.kind > EventKind.INBOUND:
            return json.dumps(self.read(event), ensure_ascii=False)
        caller = ""
        if event.kind == EventKind.CONNECT:
            caller = f', "process": {_quoted(_text(event.command))}, "pid": {event.pid}, "uid": {event.uid}'
        return (
            f'{{"time": "{_time(self._zero + event.time)}", "pod": {_quoted(self._name_of(event.cookie))}, '
            f'"event": "{"inbound" if event.kind else "connect"}", '
            f'"destination": "{_ip(event.destination)}:{event.destination_port}", '
            f'"source": "{_ip(event.source)}:{event.source_port}", '
            f"{_what_became(event.protocol, event.verdict, event.rule)}{caller}}}"
        )


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
        case _:
            what = f"{document['source']} → {document['destination']} {_outcome(document)}"
    return f"{clock} {pod}: {what}"


def _outcome(document: Document) -> str:
    to = f", to {document['listener']}" if document["listener"] else ""
    rule = f", {document['rule']}" if document["rule"] else ""
    return f"{document['protocol']}: {document['direction']} {document['verdict']}{to}{rule}"


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06}+00:00"


@lru_cache(16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(4096)
def _ip(address: bytes) -> str:
    ip = Address.from_buffer_copy(address).ip()
    return f"[{ip}]" if ip.version == 6 else str(ip)


def _endpoint(address: bytes, port: int) -> str:
    return f"{_ip(address)}:{port}"


def _text(command: bytes) -> str:
    return command.partition(b"\0")[0].decode(errors="replace")


@lru_cache(4096)
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@lru_cache(1024)
def _what_became(protocol: int, verdict: int, rule: int) -> str:
    """The part of an event's JSON that there are few of."""
    direction, became = TOTALS[verdict]
    listener = str(_LISTENERS[direction]) if became == "captured" else "null"
    return (
        f'"protocol": "{_PROTOCOLS.get(protocol, str(protocol))}", "direction": "{direction}", '
        f'"verdict": "{became}", "rule": "{RULES[rule]}", "listener": {listener}'
    )


def _signal(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
