"""The reason for a verdict in words, and the annotation behind it."""

import errno
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

from cni.enrolment.entries import Identity
from cni.enrolment.steered import Steering
from cni.enrolment.strays import NO_STRAYS, NOT_KNOWN, STRAYS, PodProcesses, Stray
from cni.netns.proc_net import endpoint
from cni.policy import annotations as istio
from cni.policy.decision import UNASKED, Inbound, Outbound, refusal
from installer.commands.explain.explainer import DETACHED, STRAY, Explanation, Protocol, routed
from installer.commands.pods.namespace import NamespaceView
from installer.commands.pods.policy_words import LISTENERS, annotations_of, is_default, part_of, proxy_of

# rule → its reason; two if the rule can capture or let pass: (captured, direct)
_RULES: dict[str, str | tuple[str, str]] = {
    "O0": "it leaves through an excluded interface",
    "O1": "its port is an excluded outbound port",
    "O2": "it goes to the pod itself from 127.0.0.6 or ::6, where the proxy's inbound connections come from",
    "O3a": "the proxy's user calls its own pod",
    "O3b": "it goes to the pod itself, and the proxy did not open it",
    "O3c": "the proxy's user opened it",
    "O4a": "the proxy's group calls its own pod",
    "O4c": "the proxy's group opened it",
    "O6": "DNS is captured",
    "O7": "it goes to 127.0.0.1 or ::1",
    "O8": "its address is in an excluded range",
    "O9": "its port is an included outbound port",
    "O10": "its address is in an included range",
    "O11": "neither port nor address is included",
    "T": ("the proxy calls its own pod in TPROXY mode", "the proxy calls a port of its own pod that is not captured"),
    "I1": "it arrives on an excluded interface",
    "I2": "no inbound ports are captured",
    "I3": "port 15008 is the tunnel's port, and the proxy itself listens there",
    "I4": ("all inbound ports except the excluded ones are captured", "its port is an excluded inbound port"),
    "I5": ("its port is an included inbound port", "its port is not among the included inbound ports"),
    "A2": "DNS is captured",
    "A3": "DNS is captured, over TCP also to the pod itself",
    "A4": "ztunnel opened it, to reach the application",
    "A5": "it goes to the pod itself",
    "A6": "ztunnel did not open it, and it leaves the pod",
    "A7": "ztunnel opened it, it is not TCP, or it goes to 127.0.0.1 or ::1",
    "B1": "kubelet of this node opened it, and its probes are for the application",
    "B2": "ztunnel gets all inbound plaintext",
    "B3": "port 15008 is ztunnel's own, or the pod's inbound plaintext bypasses ztunnel",
    "early-outbound": "the pod asks for early outbound, and its proxy has not listened yet",
    "late-outbound": "the pod asks for late outbound, it is being deleted, and its proxy listens no more",
    "deny": "the pod denies this port, no matter who connects",
    "no-route": (_REFUSED_BY_KERNEL := "the kernel would refuse it"),
    "no IPv6": "the pod's IPv6 is not captured",
    "self": "it comes from the pod itself; the outbound rules decided when it was opened",
    "transit": "it is not for one of the pod's addresses",
    str(Steering.NOT_STEERED): "the pod has no inbound steering (sk_lookup) link that lives",
    STRAY: "all of the pod's processes are stray processes",
    DETACHED: "the program that decides is attached nowhere on this node; see `sidestep status`",
    "UDP": "UDP is not captured",
    "protocol": "it is neither TCP nor UDP",
}
_OF_ZTUNNEL = ("A4", "A7")  # rules that refuse what may not be ztunnel's
_REFUSED = "it has the proxy's user or group, and the strict pod's proxy container is not known yet"
_REFUSED_MARK = "it has ztunnel's mark, and no ztunnel is known on this node yet"
_ALWAYS_EXCLUDED = "its port is one of 15020, 15021 and 15090, which are always excluded"
_UNREACHABLE = {
    errno.ENETUNREACH: "the pod has no route there, or it is a multicast or broadcast address",
    errno.EHOSTUNREACH: "a route of the pod says unreachable",
    errno.EACCES: "a route of the pod prohibits it",
    errno.EINVAL: "a route of the pod is a blackhole, or the socket is bound to an address of loopback",
}
# a datagram that nobody takes is lost without a word, so --try does not tell either
_NOT_LOOKED = " (whether somebody takes datagrams there is not known)"
_UDP_DIRECT = "no UDP is captured, except DNS if DNS capture is on"

# rule → the annotation or variable behind it, in whichever direction
ANNOTATIONS = {
    "O0": istio.EXCLUDE_INTERFACES,
    "O1": istio.EXCLUDE_OUTBOUND_PORTS,
    "O6": istio.DNS_CAPTURE,
    "O8": istio.EXCLUDE_OUTBOUND_RANGES,
    "O9": istio.INCLUDE_OUTBOUND_PORTS,
    "O10": istio.INCLUDE_OUTBOUND_RANGES,
    "O11": istio.INCLUDE_OUTBOUND_RANGES,
    "T": istio.INTERCEPTION_MODE,
    "I1": istio.EXCLUDE_INTERFACES,
    "I2": istio.INCLUDE_INBOUND_PORTS,
    "I5": istio.INCLUDE_INBOUND_PORTS,
    "early-outbound": istio.EARLY_OUTBOUND,
    "late-outbound": istio.LATE_OUTBOUND,
    "no IPv6": istio.DUAL_STACK,
}


def why(found: Explanation) -> str:
    """The rule in words."""
    rule, action = found.verdict.rule, found.verdict.action
    if action == "refuse" and rule in UNASKED:
        return f"{_UDP_DIRECT if rule == 'UDP' else _RULES[rule]}; the pod refuses what no annotation asks for"
    if action == "refuse" and rule != "deny":
        return _REFUSED_MARK if rule in _OF_ZTUNNEL else _REFUSED
    if isinstance(found.asked, Outbound) and rule == "no-route":
        return _UNREACHABLE.get(refusal(found.asked), _REFUSED_BY_KERNEL)
    if rule == "UDP" and isinstance(found.asked, Outbound):
        return _UDP_DIRECT
    if _is_always_excluded(found):
        return _ALWAYS_EXCLUDED
    words = _RULES[rule]
    return words if isinstance(words, str) else words[action == "pass"]


def rule_words(rule: str, verdict: str) -> str:
    """A rule in words, for a connection with this verdict; "" for a rule of another version."""
    words = _RULES.get(rule, "")
    return words if isinstance(words, str) else words[verdict == "direct"]


def annotation(found: Explanation) -> dict[str, Any] | None:
    """The annotation or variable behind the verdict: name, value, whether it is the default, the element that fits."""
    name = _name(found)
    if name is None:
        return None
    value = (annotations_of(found.policy) | proxy_of(found.policy))[name]
    asked = found.asked
    network = ip_network(routed(asked)) if isinstance(asked, Outbound) else None
    part = part_of(found.policy, name, asked.port, network)
    return {"name": name, "value": value, "is_default": is_default(name, value), "part": part}


def _name(found: Explanation) -> str | None:
    rule, action = found.verdict.rule, found.verdict.action
    if found.is_ambient:
        return None
    if rule == "deny":
        return istio.DENY_OUTBOUND_PORTS if isinstance(found.asked, Outbound) else istio.DENY_INBOUND_PORTS
    if action == "refuse":
        return istio.UNCAPTURED if rule in UNASKED else istio.STRICT_PROXY
    if rule == "I4" and not _is_always_excluded(found):
        return istio.EXCLUDE_INBOUND_PORTS if action == "pass" else istio.INCLUDE_INBOUND_PORTS
    if _is_always_excluded(found):
        return None
    return ANNOTATIONS.get(rule)


def _is_always_excluded(found: Explanation) -> bool:
    is_let_go = found.verdict.rule == "I4" and found.verdict.action == "pass"
    return is_let_go and found.asked.port in istio.ALWAYS_EXCLUDED_INBOUND


def explanation_document(
    pod: Identity,
    found: Explanation,
    inside: NamespaceView | None,
    steering: Steering = Steering.STEERED,
    processes: PodProcesses = NO_STRAYS,
) -> dict[str, Any]:
    """The document that is printed."""
    return {
        "pod": str(pod),
        "direction": "outbound" if isinstance(found.asked, Outbound) else "inbound",
        "connection": _connection(found.asked),
        "verdict": found.word,
        "rule": found.verdict.rule,
        "why": why(found),
        "annotation": annotation(found),
        "goes_to": _goes_to(found, inside),
        "steering": str(steering),
        "processes": processes.document(),
        "error": _error(found),
    }


def _error(found: Explanation) -> str | None:
    """The name of the errno that the call fails with; None if it is not refused."""
    if found.verdict.action == "unreachable" and isinstance(found.asked, Outbound):
        return errno.errorcode[refusal(found.asked)]
    return "EPERM" if found.verdict.action == "refuse" and isinstance(found.asked, Outbound) else None


def _connection(asked: Outbound | Inbound) -> dict[str, Any]:
    told: dict[str, Any] = {"protocol": asked.protocol, "port": asked.port, "interface": asked.interface}
    for name in ("destination", "source"):
        address = getattr(asked, name)
        told[name] = None if address is None else str(address)
    if isinstance(asked, Outbound):
        told |= {"uid": asked.uid, "gid": asked.gid, "mark": asked.mark}
    return told


def _goes_to(found: Explanation, inside: NamespaceView | None) -> dict[str, Any] | None:
    """Who receives the connection. `is_listening` is None if it is unknown: outside the pod, a lost namespace."""
    asked, action = found.asked, found.verdict.action
    if action in ("refuse", "unreachable"):
        return None
    if action in LISTENERS:
        what, port = LISTENERS[action]
        return {"what": what, "port": port, "is_listening": _listens(inside, port, asked.protocol)}
    if isinstance(asked, Inbound):
        told = _listens(inside, asked.port, asked.protocol) if found.verdict.rule != "transit" else None
        return {"what": "its own port", "port": asked.port, "is_listening": told}
    to = routed(asked)
    is_own = to in asked.own_addresses or to.is_loopback
    told = _listens(inside, asked.port, asked.protocol) if is_own else None
    return {"what": endpoint(to, asked.port), "port": asked.port, "is_listening": told}


def _listens(inside: NamespaceView | None, port: int, protocol: Protocol) -> bool | None:
    sockets = inside.of(protocol) if inside else None
    return None if sockets is None else any(each.port == port for each in sockets)


def explanation_text(document: dict[str, Any]) -> str:
    """The document as text for people."""
    lines = [_headline(document)]
    lines.append(f"  {document['verdict']}, rule {document['rule']}: {document['why']}")
    if document.get("is_shadow"):
        lines.append("  but         it is a shadow pod: Istio's rules capture it, and sidestep changes nothing")
    cause = document["annotation"]
    if cause:
        lines.append(f"  annotation  {shown_annotation(cause)}")
    if (state := Steering(document["steering"])) != Steering.STEERED:
        lines.append(f"  inbound     {state.words}")
    if document["rule"] != DETACHED:  # otherwise the programs see no process at all
        lines += _processes(document["processes"])
    goes = document["goes_to"]
    if goes:
        port = f", port {goes['port']}" if document["verdict"] == "captured" else ""
        listening = {True: " (somebody listens)", False: " (NOBODY listens)", None: ""}[goes["is_listening"]]
        unseen = document["connection"]["protocol"] == "udp" and goes["is_listening"] is None
        lines.append(f"  goes to     {goes['what']}{port}{_NOT_LOOKED if unseen else listening}")
        if document["verdict"] == "captured" and goes["is_listening"] and _is_anothers(document):
            lines.append(f"  but         {document['proxy']['words']}")
    else:
        error = document["error"]
        lines.append(f"  goes to     nobody: {f'the call fails with {error}' if error else 'the client gets a RST'}")
    lines += [f"  annotation  {each}" for each in document.get("annotations", ())]
    for other in document.get("other_ports", ()):
        lines.append(f"  but port {other['port']}: {other['verdict']}, rule {other['rule']}: {other['why']}")
    tried = document.get("try")
    if tried:
        lines.append(f"  tried       {tried['happened']}")
        lines.append(f"              {'as explained' if tried['agrees'] else 'NOT as explained: ' + tried['differs']}")
    return "\n".join(lines) + "\n"


def _is_anothers(document: dict[str, Any]) -> bool:
    """Whether somebody else than the proxy listens where inbound connections should go."""
    state = document.get("proxy", {"state": "listens"})["state"]
    return bool(document["direction"] == "inbound" and state != "listens")


def _processes(processes: dict[str, Any]) -> Iterator[str]:
    """Lines about the processes that the explanation is not about, because no program sees them."""
    if processes["strays"]:
        yield f"  but not     {STRAYS}:"
        yield from (f"              {Stray(**each)}" for each in processes["strays"])
    if processes["unknown"]:
        yield f"  processes   {NOT_KNOWN}: {processes['unknown']}"


def _headline(document: dict[str, Any]) -> str:
    asked, protocol = document["connection"], document["connection"]["protocol"].upper()
    if document["direction"] == "outbound":
        bound = f", from {asked['source']}" if asked["source"] else ""
        to = endpoint(asked["destination"], asked["port"])
        return f"{document['pod']}, uid {asked['uid']} gid {asked['gid']}{bound} → {to} ({protocol})"
    to = f" at {asked['destination']}" if asked["destination"] else ""
    port = "any port" if asked["port"] is None else f"port {asked['port']}"
    return f"{asked['source']} → {document['pod']}{to}, {port} ({protocol})"


def shown_annotation(cause: dict[str, Any]) -> str:
    """The annotation behind a verdict, as text: long lists are cut."""
    value, part = cause["value"], cause["part"]
    if len(value) > 60:
        value = f"{value[:50]}… ({value.count(',') + 1} elements)"
    more = f", matching element {part}" if part and part != value else ""
    return f'{cause["name"]}: "{value}"{more}{" (default)" if cause["is_default"] else ""}'
