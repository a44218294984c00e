"""Why something was not captured, in words, and the annotation behind it."""

from bpf.layout import Way
from cni.enrolment.uncaptured import Uncaptured
from cni.policy import annotations as istio
from cni.policy.ambient_annotations import BYPASS_INBOUND
from cni.policy.decision import TUNNEL_PORT
from installer.commands.explain.explanation import ANNOTATIONS, rule_words

_NO_PROXY = "it is captured, but no proxy listened"
_NOT_KNOWN_YET = "it has the proxy's user or group, and the strict pod's proxy container was not known yet"
_SOCKET = "raw sockets and ICMP are not captured, and no hook sees where their packets go"
_UDP_OUT = "UDP is not captured, but for DNS if DNS capture is on"

# rules behind which each direction has an annotation of its own
_OUTBOUND, _INBOUND = (
    {"deny": istio.DENY_OUTBOUND_PORTS},
    {"deny": istio.DENY_INBOUND_PORTS, "I4": istio.EXCLUDE_INBOUND_PORTS},
)
# what has ztunnel's mark in a pod in ambient mode
_MARKED = ("A4", "A7")
_NO_ZTUNNEL_KNOWN = "it has ztunnel's mark, and no ztunnel was known on this node yet"
_NO_ZTUNNEL = "it is captured, but ztunnel did not have the pod"
# rules of the proxy's ids: a strict pod's sockets are refused by them until its proxy's container is known
_OF_PROXY = ("O3c", "O4c")


def reason(each: Uncaptured) -> str:
    """The rule in words."""
    if each.is_refused and each.way is Way.IN and each.rule != "deny":
        return _NO_PROXY
    if each.is_refused and each.rule in _OF_PROXY:
        return _NOT_KNOWN_YET
    if each.rule == "protocol":
        words = _SOCKET
    elif each.rule == "UDP" and each.way is Way.OUT:
        words = _UDP_OUT
    else:
        words = rule_words(each.rule, "direct")
    return words


def annotation_behind(each: Uncaptured) -> str | None:
    """The annotation, or variable of the proxy, that has it so; None if there is none.

    Of what is refused because the pod wants nothing past its proxy, it is the annotation that says so.
    """
    if each.way is Way.IN:
        return None if each.is_refused and each.rule != "deny" else (_INBOUND | ANNOTATIONS).get(each.rule)
    if each.is_refused and each.rule in _OF_PROXY:
        return istio.STRICT_PROXY
    if each.is_refused and each.rule != "deny":
        return istio.UNCAPTURED
    return (_OUTBOUND | ANNOTATIONS).get(each.rule)


def ambient_reason(each: Uncaptured) -> str:
    """reason() for a pod in ambient mode."""
    if each.is_refused and each.way is Way.IN:
        return _NO_ZTUNNEL
    if each.is_refused and each.rule in _MARKED:
        return _NO_ZTUNNEL_KNOWN
    return reason(each)


def ambient_annotation_behind(each: Uncaptured) -> str | None:
    """annotation_behind() for a pod in ambient mode, where only one annotation lets connections past ztunnel."""
    is_bypass = each.way is Way.IN and each.rule == "B3" and each.port != TUNNEL_PORT
    return BYPASS_INBOUND if is_bypass else None
