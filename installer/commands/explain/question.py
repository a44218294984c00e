"""`sidestep explain`: from the arguments to the answer."""

import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from bpf.errors import SidestepError
from bpf.layout import PodFlags
from bpf.pins import Pins
from bpf.tables import Tables
from cni.policy.decision import IPAddress
from installer.commands.command import qualified
from installer.commands.explain.ends import application_port, end_called, enrolled_end
from installer.commands.explain.explainer import Asker, Explainer, Explanation, Protocol
from installer.commands.explain.explanation import explanation_document, why
from installer.commands.explain.walk import End, walk
from installer.commands.explain.walk_text import walk_document
from installer.commands.names import NoSuchPod
from installer.commands.pods.differences import Described, described
from installer.commands.pods.enrolled_pods import find_pod
from installer.commands.pods.namespace import NamespaceView
from installer.commands.pods.pod_document import why_not_enrolled
from installer.commands.pods.proxy_state import proxy_state
from installer.settings import Node

# [namespace/]name[:port[/protocol]]: names as Kubernetes has them (DNS subdomains)
_POD = re.compile(
    r"(?P<pod>(?:[a-z0-9][a-z0-9.-]*/)?[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::(?P<port>\d+)(?:/(?P<protocol>tcp|udp))?)?"
)
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
    namespace: str = ""  # of pods whose names have none

    @property
    def pod_name(self) -> str:
        """The name of POD, with its namespace if that is known."""
        return qualified(self.pod, self.namespace)

    @property
    def protocol(self) -> Protocol:
        """The protocol: as in DEST (10.96.0.10:53/udp), else by --udp. Raises BadAddress if the two differ."""
        named = None
        if self.dest is not None:
            named = self.to_pod[2] if self.to_pod else endpoint_of(self.dest)[2]
        if self.udp and named == "tcp":
            raise BadAddress(f'"{self.dest}" says tcp, and --udp says otherwise; give one of them')
        return named or ("udp" if self.udp else "tcp")

    @property
    def to_pod(self) -> tuple[str, int | None, Protocol | None] | None:
        """The pod that DEST names, with its port and protocol if they are given; None if DEST is an address."""
        if self.dest is None:
            return None
        if _ENDPOINT.fullmatch(self.dest) and _is_address(self.dest.rpartition(":")[0]):
            return None
        return pod_of(self.dest)

    def require_endpoints(self) -> None:
        """Raise BadAddress if an argument should be an address and is not."""
        if self.dest is not None:
            assert self.protocol
        for what in ("inbound", "to", "source"):
            if getattr(self, what) is not None:
                address_of(getattr(self, what), f"--{what}")


def answer(pins: Pins, node: Node, question: Question) -> dict[str, Any]:
    """The document that is printed. Raises SidestepError if there is no answer."""
    now = described(node)
    with ExitStack() as stack:
        tables = stack.enter_context(Tables(pins.look_only()))
        try:
            pod = find_pod(pins, tables, question.pod_name)
        except NoSuchPod as error:
            raise NoSuchPod(why_not_enrolled(tables, now, node, question.pod_name) or str(error)) from error
        end = stack.enter_context(enrolled_end(pins, tables, pod, now, node.proc))
        assert end.explainer is not None
        if question.to_pod is not None:
            document, found = _walked(stack, pins, tables, now, node, question, end)
        else:
            found, others = _explained(end.explainer, question, end.inside)
            document = explanation_document(pod.identity, found, end.inside, end.steering, end.processes)
            document |= {"annotations": list(end.misspelt), "proxy": proxy_state(pod, end.inside).document()}
            document["is_shadow"] = PodFlags.SHADOW in pod.flags
            if question.inbound is not None and question.port is None:
                document["connection"]["port"] = None
                document["goes_to"] |= {"is_listening": None} if found.verdict.action == "pass" else {}
                document["other_ports"] = [_briefly(each) for each in others]
        if question.is_tried:
            from installer.commands.explain.attempt import tried

            attempt = tried(pins, node.proc, tables, pod, found, end.inside, question.interface)
            document["try"] = attempt
            if "steps" in document and document["state"] != "wrong" and not attempt["agrees"]:
                document |= {"state": "wrong", "headline": f"WRONG: NOT as explained: {attempt['differs']}"}
    return document


def _walked(
    stack: ExitStack, pins: Pins, tables: Tables, now: Described, node: Node, question: Question, client: End
) -> tuple[dict[str, Any], Explanation]:
    """The document about both legs, and the explanation of the first."""
    name, port, _ = question.to_pod or ("", None, None)
    name = qualified(name, question.namespace)
    server = stack.enter_context(end_called(pins, tables, name, now, node))
    assert client.explainer is not None
    by = _asker(client.explainer, question, client.inside)
    port = application_port(server, question.protocol) if port is None else port
    found = walk(client, server, port, by, question.protocol)
    return walk_document(client.name, server.name, found), found.first


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
        raise BadAddress(
            f'"{text}" is neither an address and port nor a pod; give ADDRESS:PORT, [IPV6]:PORT or POD:PORT, with '
            "/udp behind it for UDP"
        )
    address = address_of(shape["six"] if shape["six"] is not None else shape["four"], "DEST")
    port = int(shape["port6"] or shape["port4"])
    if port > 65535:
        raise BadAddress(f'"{text}" has port {port}; ports are 0–65535')
    protocol: Protocol | None = None
    if shape["protocol"]:
        protocol = "udp" if shape["protocol"].lower() == "udp" else "tcp"
    return address, port, protocol


def pod_of(text: str) -> tuple[str, int | None, Protocol | None] | None:
    """The name, port and protocol of a DEST that names a pod; None if it does not look like one. Raises BadAddress."""
    shape = _POD.fullmatch(text)
    if shape is None or _is_address(text) or _is_address(shape["pod"]):
        return None
    port = int(shape["port"]) if shape["port"] else None
    if port is not None and port > 65535:
        raise BadAddress(f'"{text}" has port {port}; ports are 0–65535')
    protocol: Protocol | None = None
    if shape["protocol"]:
        protocol = "udp" if shape["protocol"] == "udp" else "tcp"
    return shape["pod"], port, protocol


def _is_address(text: str) -> bool:
    with suppress(ValueError):
        ip_address(text.strip("[]"))
        return True
    return False


def address_of(text: str, what: str) -> IPAddress:
    """An address. Raises BadAddress, also for a host name: names are not looked up."""
    try:
        return ip_address(text)
    except ValueError:
        raise BadAddress(
            f'{what}: "{text}" is not an IP address; names are not looked up, so give the address itself'
        ) from None
