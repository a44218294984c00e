"""`sidestep explain POD POD[:PORT]`: walks from the client's decision to the server's application, a step at a time.

The steps are looked at, one after the other: what the client's rules decide, whether its proxy listens, the way, what
the server's rules decide, whether its proxy listens, and whether the application does. So the first step that is wrong
is the one to see to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, PodFlags
from cni.enrolment.steered import Steering
from cni.enrolment.strays import PodProcesses
from cni.netns.proc_net import endpoint
from cni.policy.decision import IPAddress
from installer.commands.explain.explainer import DETACHED, Asker, Explainer, Explanation, Protocol
from installer.commands.explain.explanation import annotation, why
from installer.commands.pods.enrolled_pods import EnrolledPod
from installer.commands.pods.namespace import NamespaceView
from installer.commands.pods.policy_words import LISTENERS
from installer.commands.pods.proxy_state import Proxy, proxy_state
from installer.verdict.verdict import State

OUTSIDE = "processes of this pod are outside of the attach point"


@dataclass(frozen=True)
class End:
    """A pod at one end: what is known of it. `pod` is None if it is not enrolled, and `reason` says why not."""

    name: str
    addresses: frozenset[IPAddress]
    inside: NamespaceView | None
    pod: EnrolledPod | None = None
    explainer: Explainer | None = None
    steering: Steering = Steering.STEERED
    processes: PodProcesses = field(default_factory=PodProcesses)
    reason: str = ""
    misspelt: tuple[str, ...] = ()

    def address(self, version: int) -> IPAddress | None:
        """An address of this family that others can reach."""
        fitting = (ip for ip in self.addresses if ip.version == version and not ip.is_link_local)
        return min(fitting, key=int, default=None)


@dataclass(frozen=True)
class Step:
    """What was found at one step. `state` is OK, WRONG, UNKNOWN or NOTE."""

    who: str
    state: State
    what: str
    annotation: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"who": self.who, "state": str(self.state), "what": self.what, "annotation": self.annotation}


@dataclass(frozen=True)
class Walk:
    """All steps, and the first leg's explanation."""

    steps: tuple[Step, ...]
    first: Explanation
    to: IPAddress
    port: int

    @property
    def state(self) -> State:
        """The worst of the steps."""
        states = {each.state for each in self.steps}
        return next((each for each in (State.WRONG, State.UNKNOWN) if each in states), State.OK)

    @property
    def headline(self) -> str:
        """The verdict in one line: the first step that is not well."""
        first = next((each for each in self.steps if each.state is self.state), None)
        if self.state is State.OK or first is None:
            if self.first.verdict.action == "dns":
                return f"OK: {LISTENERS['dns'][0]} gets it, and not {endpoint(self.to, self.port)}"
            return f"OK: {endpoint(self.to, self.port)} should be reached"
        return f"{self.state.upper()}: {first.what}"


def walk(client: End, server: End, port: int, by: Asker, protocol: Protocol) -> Walk:
    """Walk from a pod to a port of another, over IPv4 if both have it. Raises SidestepError."""
    assert client.explainer is not None
    to, source = _addresses(client, server)
    first = client.explainer.outbound(to, port, by, protocol)
    steps = [
        *(_strays(client) if first.verdict.rule != DETACHED else ()),  # the programs see no process at all
        _decision("client", first),
        *_outbound_proxy(client, first),
        *_beyond(client, server, source, port, to, first, protocol),
        *_misspelt("client", client),
        *(_misspelt("server", server) if server.name != client.name else ()),
    ]
    return Walk(tuple(steps), first, to, port)


def _beyond(
    client: End, server: End, source: IPAddress, port: int, to: IPAddress, first: Explanation, protocol: Protocol
) -> Iterator[Step]:
    """The steps outside of the client: none if the client's own resolver gets the query."""
    if first.verdict.action == "dns":
        yield _resolver(client, protocol)
        return
    yield _way(client, server, to, port, first, protocol)
    yield from _server(server, source, port, to, protocol)
    yield _application(server, source, port, to, protocol)


def _addresses(client: End, server: End) -> tuple[IPAddress, IPAddress]:
    for version in (4, 6):
        to, source = server.address(version), client.address(version)
        if to and source:
            return to, source
    raise SidestepError(f"{client.name} and {server.name} have no addresses of the same family; give ADDRESS:PORT")


def _decision(who: str, found: Explanation) -> Step:
    """What the rules of a pod decide."""
    is_open = found.verdict.rule in (str(Steering.NOT_STEERED), DETACHED)
    is_bad = found.word in ("refused", "denied", "unreachable") or is_open
    what = f"{found.word}, rule {found.verdict.rule}: {why(found)}"
    if found.verdict.rule == str(Steering.NOT_STEERED):
        what = Steering.NOT_STEERED.words
    elif found.verdict.rule == DETACHED:
        what = f"not captured: {why(found)}"
    return Step(who, State.WRONG if is_bad else State.OK, what, annotation(found))


def _strays(end: End) -> Iterator[Step]:
    if end.processes.strays:
        yield Step("client", State.WRONG, f"{OUTSIDE}: {', '.join(map(str, end.processes.strays))}")
    if end.processes.unknown:
        yield Step("client", State.UNKNOWN, end.processes.words)


def _outbound_proxy(client: End, first: Explanation) -> Iterator[Step]:
    """The client's own proxy, if it gets the connection."""
    if first.verdict.action != "proxy-outbound":
        return
    assert client.pod is not None
    if client.inside is None:
        yield Step("its proxy", State.UNKNOWN, "the pod's namespace can't be looked at")
        return
    wanted, users = client.pod.entry.proxy_uid, client.inside.users(OUTBOUND_PORT)
    if not users:
        yield Step("its proxy", State.WRONG, f"nobody listens on {OUTBOUND_PORT}, so the connection is refused")
    elif PodFlags.AMBIENT not in client.pod.flags and wanted not in users:
        told = f"uid {', '.join(map(str, users))} listens on {OUTBOUND_PORT}, the proxy is uid {wanted} by the Pod"
        yield Step("its proxy", State.WRONG, told)
    else:
        yield Step("its proxy", State.OK, f"listens on {OUTBOUND_PORT}")


def _resolver(client: End, protocol: Protocol) -> Step:
    """The client's own resolver, which asks nameservers of its own."""
    who, (what, port) = "its resolver", LISTENERS["dns"]
    sockets = client.inside.of(protocol) if client.inside else None
    if sockets is None:
        return Step(who, State.UNKNOWN, f"whether {what} listens on {port} can't be looked at")
    if not any(each.port == port for each in sockets):
        return Step(who, State.WRONG, f"nobody listens on {_named(port, protocol)}, so the query is refused")
    return Step(who, State.OK, f"{what} listens on {_named(port, protocol)}")


def _named(port: int, protocol: Protocol) -> str:
    return f"UDP port {port}" if protocol == "udp" else str(port)


def _way(client: End, server: End, to: IPAddress, port: int, first: Explanation, protocol: Protocol) -> Step:
    """From the client's proxy, or the client itself, to the server's pod."""
    where = f"to {to}, {'the pod itself' if server.name == client.name else 'a pod of this node'}"
    if first.verdict.action != "proxy-outbound":
        return Step("the way", State.OK, where)
    assert client.explainer is not None
    second = client.explainer.outbound(to, port, client.explainer.asker(), protocol)
    if second.word in ("refused", "denied", "unreachable"):
        return Step("the way", State.WRONG, f"{where}: the proxy can't connect: {why(second)}", annotation(second))
    return Step("the way", State.OK, where)


def _server(server: End, source: IPAddress, port: int, to: IPAddress, protocol: Protocol) -> Iterator[Step]:
    """What the server's rules decide, and its proxy if that gets the connection."""
    if server.explainer is None or server.pod is None:
        yield Step("server", State.NOTE, f"not captured by sidestep: {server.reason}")
        return
    if server.steering is Steering.UNKNOWN:
        yield Step("server", State.UNKNOWN, server.steering.words)
    found = server.explainer.inbound(source, port, to, protocol)
    yield _decision("server", found)
    if found.verdict.action == "proxy-inbound":
        proxy = proxy_state(server.pod, server.inside)
        is_well = proxy.state is Proxy.LISTENS
        what = f"listens on {INBOUND_PORT}" if is_well else proxy.words
        yield Step("its proxy", State.OK if is_well else State.WRONG, what)


def _application(server: End, source: IPAddress, port: int, to: IPAddress, protocol: Protocol) -> Step:
    """Whether somebody listens on the port itself, at an address that the connection reaches."""
    who, named = "application", _named(port, protocol)
    if server.inside is None:
        return Step(who, State.UNKNOWN, f"who listens on {named} can't be looked at: the namespace is not found")
    sockets = server.inside.of(protocol)
    if sockets is None:
        return Step(who, State.UNKNOWN, f"who listens on {named} can't be looked at: the kernel does not tell")
    behind = ""
    if server.explainer and server.explainer.inbound(source, port, to, protocol).verdict.action == "proxy-inbound":
        behind = " behind the proxy"
    found = [each.ip for each in sockets if each.port == port]
    if not found:
        return Step(who, State.WRONG, f"nobody listens on {named}{behind}")
    # since Istio 1.10 a proxy dials the pod's own address, and a Sidecar's defaultEndpoint can name 127.0.0.1
    if all(ip.is_loopback for ip in found):
        told = ", ".join(sorted(map(str, set(found))))
        usual = "a proxy dials the pod's address, unless a Sidecar says otherwise"
        if not behind:
            return Step(who, State.WRONG, f"nobody listens on {named} at the pod's address, only at {told}")
        return Step(who, State.UNKNOWN, f"somebody listens on {named} at {told} only; {usual}")
    return Step(who, State.OK, f"listens on {named}")


def _misspelt(who: str, end: End) -> Iterator[Step]:
    yield from (Step(who, State.NOTE, each) for each in end.misspelt)
