"""`sidestep explain`: from the arguments to the answer."""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bpf.errors import SidestepError
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.steered import steering_of
from cni.enrolment.strays import processes_of
from cni.policy.decision import IPAddress
from installer.commands.explain.explainer import Asker, Explainer, Explanation, Protocol
from installer.commands.explain.explanation import explanation_document, why
from installer.commands.pods.enrolled_pods import find_pod
from installer.commands.pods.namespace import NamespaceView, looked_into

# [address]:port or address:port, and the protocol if it is given; address_of() checks the address
_ENDPOINT = re.compile(
    r"(?:\[(?P<six>[^\]]*)\]:(?P<port6>\d+)|(?P<four>[^:\[\]]*):(?P<port4>\d+))(?:/(?P<protocol>tcp|udp))?",
    re.IGNORECASE,
)


class BadAddress(SidestepError):
    """An argument is not an address, or not an address and port."""


@dataclass(frozen=True)
class Question:
    """The arguments. Addresses are text that is not checked yet."""

    pod: str
    dest: str | None = None
    inbound: str | None = None
    port: int | None = None
    to: str | None = None
    as_proxy: bool = False
    uid: int | None = None
    gid: int | None = None
    udp: bool = False
    source: str | None = None
    interface: str | None = None
    mark: int | None = None
    is_tried: bool = False

    @property
    def protocol(self) -> Protocol:
        """The protocol: as in DEST (10.96.0.10:53/udp), else by --udp. Raises BadAddress if the two differ."""
        named = endpoint_of(self.dest)[2] if self.dest is not None else None
        if self.udp and named == "tcp":
            raise BadAddress(f'"{self.dest}" says tcp, and --udp says otherwise; give one of them')
        return named or ("udp" if self.udp else "tcp")

    def require_endpoints(self) -> None:
        """Raise BadAddress if an argument should be an address and is not."""
        if self.dest is not None:
            assert self.protocol
        for what in ("inbound", "to", "source"):
            if getattr(self, what) is not None:
                address_of(getattr(self, what), f"--{what}")


def answer(pins: Pins, proc: Path, question: Question) -> dict[str, Any]:
    """The document that is printed. Raises SidestepError if there is no answer."""
    with ExitStack() as stack:
        tables = stack.enter_context(Tables(pins.look_only()))
        pod = find_pod(pins, tables, question.pod)
        inside = stack.enter_context(looked_into(pod, proc))
        steering = steering_of(pins, tables, [pod.cookie], proc)[pod.cookie]
        processes = processes_of(pins, [pod.cookie], proc)[pod.cookie]
        explainer = Explainer(pod, tables, inside.interfaces if inside else {}, steering, processes)
        found, others = _explained(explainer, question, inside)
        document = explanation_document(pod.identity, found, inside, steering, processes)
        if question.inbound is not None and question.port is None:
            document["connection"]["port"] = None
            document["goes_to"] |= {"is_listening": None} if found.verdict.action == "pass" else {}
            document["other_ports"] = [_briefly(each) for each in others]
        if question.is_tried:
            from installer.commands.explain.attempt import tried

            document["try"] = tried(pins, proc, tables, pod, found, inside, question.interface)
    return document


def _explained(
    explainer: Explainer, question: Question, inside: NamespaceView | None
) -> tuple[Explanation, list[Explanation]]:
    """The explanation, and those of the ports that get another verdict."""
    protocol = question.protocol
    if question.inbound is None:
        destination, port, _ = endpoint_of(question.dest or "")
        source = None if question.source is None else address_of(question.source, "--source")
        by = _asker(explainer, question, inside)
        how = (source, question.mark or 0, question.interface)
        return explainer.outbound(destination, port, by, protocol, *how), []
    source = address_of(question.inbound, "--inbound")
    to = None if question.to is None else address_of(question.to, "--to")
    if question.port is None:
        return explainer.inbound_ports(source, to, question.interface)
    return explainer.inbound(source, question.port, to, protocol, question.interface), []


def _asker(explainer: Explainer, question: Question, inside: NamespaceView | None) -> Asker:
    if question.as_proxy:
        return explainer.asker()
    ids = question.uid or 0, question.gid or 0
    return Asker(*(inside.outside_ids(*ids) if inside else ids))


def _briefly(found: Explanation) -> dict[str, Any]:
    return {"port": found.asked.port, "verdict": found.word, "rule": found.verdict.rule, "why": why(found)}


def endpoint_of(text: str) -> tuple[IPAddress, int, Protocol | None]:
    """The address and port of a DEST, and its protocol if it names one. Raises BadAddress."""
    shape = _ENDPOINT.fullmatch(text)
    if shape is None:
        raise BadAddress(f'"{text}" is not an address and port; give ADDRESS:PORT or [IPV6]:PORT, with /udp for UDP')
    address = address_of(shape["six"] if shape["six"] is not None else shape["four"], "DEST")
    port = int(shape["port6"] or shape["port4"])
    if port > 65535:
        raise BadAddress(f'"{text}" has port {port}; ports are 0–65535')
    protocol: Protocol | None = None
    if shape["protocol"]:
        protocol = "udp" if shape["protocol"].lower() == "udp" else "tcp"
    return address, port, protocol


def address_of(text: str, what: str) -> IPAddress:
    """An address. Raises BadAddress, also for a host name: names are not looked up."""
    try:
        return ip_address(text)
    except ValueError:
        raise BadAddress(
            f'{what}: "{text}" is not an IP address; names are not looked up, so give the address itself'
        ) from None
