"""Turns the programs' events into plain values.

A newer version's programs may use numbers for which this version has no name. They are shown as numbers.
"""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from signal import Signals
from typing import Any

from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, RULES, TOTALS, Address, Event, EventKind
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from installer.commands.explain.explanation import rule_words

Document = dict[str, Any]

_PROTOCOLS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}
_NAMES = {int(kind): kind.name.lower() for kind in EventKind}
_RESOLVER_PORT = 15053
# direction → port at which a captured connection arrives
_LISTENERS = {"outbound": OUTBOUND_PORT, "self": INBOUND_PORT, "inbound": INBOUND_PORT, "dns": _RESOLVER_PORT}


# direction and verdict → what became of the connection, if that is known when it is decided
_OUTCOMES = {
    ("inbound", "refused"): f"nobody listens on {INBOUND_PORT}",
    ("outbound", "refused"): "the proxy's container is not known yet",
    ("outbound", "denied"): "the pod denies the port",
    ("inbound", "denied"): "the pod denies the port",
    ("outbound", "unreachable"): "the pod has no route there",
}
# rules that refuse a socket with ztunnel's mark, and then the outcome
_MARKED, _NO_ZTUNNEL = ("A4", "A7"), "no ztunnel is known on this node yet"
# rules by which a connection is the proxy's, whatever its user: its group, or a proxy that runs as root
_OF_PROXY = ("O3a", "O3c", "O4a", "O4c", "T")


def counted_as(verdict: int) -> tuple[str, str]:
    """The direction and verdict behind an event's number."""
    return TOTALS[verdict] if verdict < len(TOTALS) else ("unknown", f"verdict {verdict}")


@dataclass(frozen=True)
class Known:
    """What is known of the node's pods: the one at each address (as in the maps), and each proxy's user by cookie."""

    at: Mapping[bytes, str] = field(default_factory=dict)
    proxies: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tables: Tables) -> "Known":
        """As the maps have it now. An address that several pods have says nothing."""
        entered = {key.cookie: pod for key, pod in tables.pods.every()}
        at: dict[bytes, str] = {}
        for key in tables.addresses.every_key():
            if key.cookie in entered:
                address = bytes(key.address)
                at[address] = "" if address in at else str(Identity.of(entered[key.cookie]))
        named = {address: name for address, name in at.items() if name}
        return cls(named, {cookie: pod.proxy_uid for cookie, pod in entered.items()})


def outcome_of(direction: str, verdict: str) -> str:
    """What became of a connection with this verdict, if that is known when it is decided; else ""."""
    return _OUTCOMES.get((direction, verdict), "")


class Reader:
    """Makes documents of events. `name_of` gives a pod's name for its cookie; `known` may be replaced at any time."""

    def __init__(self, name_of: Callable[[int], str], known: Known | None = None) -> None:
        self._name_of = name_of
        self.known = known or Known()
        self._zero = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def read(self, event: Event) -> Document:
        """An event in plain values."""
        kind = event.kind
        document: Document = {
            "time": _time(self._zero + event.time),
            "pod": self._name_of(event.cookie),
            "event": _NAMES.get(kind, f"event {kind}"),
        }
        if kind not in _NAMES:
            return document
        if kind == EventKind.KILLED:
            return document | {
                "process": _text(event.command),
                "pid": event.pid,
                "uid": event.uid,
                "signal": _signal(event.signal),
                "sender": event.sender or None,
            }
        document["destination"] = _endpoint(event.destination, event.destination_port)
        document["destination_pod"] = self.known.at.get(bytes(event.destination))
        if kind in (EventKind.LISTENING, EventKind.CLOSED):
            return document
        direction, verdict = counted_as(event.verdict)
        rule = _rule(event.rule)
        document |= {
            "source": _endpoint(event.source, event.source_port),
            "source_pod": self.known.at.get(bytes(event.source)),
            "protocol": _PROTOCOLS.get(event.protocol, str(event.protocol)),
            "direction": direction,
            "verdict": verdict,
            "rule": rule,
            "why": _words(rule, verdict),
            "listener": _LISTENERS[direction] if verdict == "captured" else None,
            "outcome": _NO_ZTUNNEL if verdict == "refused" and rule in _MARKED else _OUTCOMES.get((direction, verdict)),
        }
        if kind == EventKind.CONNECT:
            is_proxy = rule in _OF_PROXY or (event.uid != 0 and event.uid == self.known.proxies.get(event.cookie))
            process = {"process": _text(event.command), "pid": event.pid, "uid": event.uid, "is_proxy": is_proxy}
            document |= process
        return document


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06}+00:00"


@lru_cache(16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _endpoint(address: Address, port: int) -> str:
    return f"{_ip(bytes(address))}:{port}"


@lru_cache(4096)
def _ip(address: bytes) -> str:
    ip = Address.from_buffer_copy(address).ip()
    return f"[{ip}]" if ip.version == 6 else str(ip)


def _rule(number: int) -> str:
    return RULES[number] if number < len(RULES) else f"rule {number}"


@lru_cache(256)
def _words(rule: str, verdict: str) -> str:
    return rule_words(rule, verdict)


@lru_cache(4096)
def _text(command: bytes) -> str:
    """A process's name. Unprintable ones are escaped: processes choose their names, and must not control a terminal."""
    text = command.decode(errors="replace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _signal(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:  # a real-time signal has no name
        return str(number)
