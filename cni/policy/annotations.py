"""Turns a Pod's annotations into a CapturePolicy. All defaults, syntax checks and refusals are in this module.

If an annotation is absent, its default counts. If it is present, it counts as it stands, and "" is the empty list. A
value that Istio refuses is refused here too. So are the few values that pass Istio's own check and then fail in
iptables-restore.
"""

import json
import re
from collections.abc import Mapping
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict

from bpf.layout import LEVELS, Level
from cni.errors import InvalidAnnotation
from cni.policy.pod import Container, Pod, parse_bool

INTERCEPTION_MODE = "sidecar.istio.io/interceptionMode"
INCLUDE_OUTBOUND_RANGES = "traffic.sidecar.istio.io/includeOutboundIPRanges"
EXCLUDE_OUTBOUND_RANGES = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
INCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/includeOutboundPorts"
EXCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/excludeOutboundPorts"
INCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/includeInboundPorts"
EXCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
EXCLUDE_INTERFACES = "traffic.sidecar.istio.io/excludeInterfaces"
REROUTE_INTERFACES = "istio.io/reroute-virtual-interfaces"
KUBEVIRT_INTERFACES = "traffic.sidecar.istio.io/kubevirtInterfaces"

# sidestep's own annotations. Istio has nothing like the first two, so they are off unless a Pod asks for them.
EARLY_OUTBOUND = "sidestep.io/early-outbound"
LATE_OUTBOUND = "sidestep.io/late-outbound"
STRICT_PROXY = "sidestep.io/strict-proxy"
ACCELERATION = "sidestep.io/acceleration"
DENY_OUTBOUND_PORTS = "sidestep.io/deny-outbound-ports"
DENY_INBOUND_PORTS = "sidestep.io/deny-inbound-ports"
UNCAPTURED = "sidestep.io/uncaptured"
LIVE_POLICY = "sidestep.io/live-policy"

# What a running pod follows if it or its node has live policies: capture alone decides by these. What istiod's injector
# puts into the proxy as well, such as the interception mode, would be one thing here and another in the proxy.
FOLLOWED = (
    INCLUDE_OUTBOUND_RANGES,
    EXCLUDE_OUTBOUND_RANGES,
    INCLUDE_OUTBOUND_PORTS,
    EXCLUDE_OUTBOUND_PORTS,
    INCLUDE_INBOUND_PORTS,
    EXCLUDE_INBOUND_PORTS,
    UNCAPTURED,
    LIVE_POLICY,
)

DNS_CAPTURE = "ISTIO_META_DNS_CAPTURE"
DUAL_STACK = "ISTIO_DUAL_STACK"
INVALID_DROP = "INVALID_DROP"

# user and group of istio-proxy unless its securityContext says otherwise
PROXY_ID = 1337
# ports of pilot-agent's status, and of Envoy's health and telemetry: kubelet and Prometheus always get through
ALWAYS_EXCLUDED_INBOUND = frozenset((15020, 15021, 15090))

_ALL = "*"
_DEFAULTS = {
    INTERCEPTION_MODE: "REDIRECT",
    INCLUDE_OUTBOUND_RANGES: _ALL,
    EXCLUDE_OUTBOUND_RANGES: "",
    INCLUDE_OUTBOUND_PORTS: "",
    EXCLUDE_OUTBOUND_PORTS: "15020",
    INCLUDE_INBOUND_PORTS: _ALL,
    EXCLUDE_INBOUND_PORTS: "15020",
    EXCLUDE_INTERFACES: "",
    REROUTE_INTERFACES: "",
    KUBEVIRT_INTERFACES: "",
    DENY_OUTBOUND_PORTS: "",
    DENY_INBOUND_PORTS: "",
}

# what Go's strings.TrimSpace removes; str.strip() without an argument would remove 0x1c to 0x1f too
_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
# What both Istio's own check and iptables-restore accept. Istio trims the text for its check and passes it on as it
# stands. In iptables-restore, blanks and tabs separate words, a line's end ends the rule, and strtoul() skips space
# before the digits but not after them. No leading zeros: iptables-restore does not take 080.
_PORT = re.compile(r"[ \t]*[\v\f\r]*(0|[1-9][0-9]{0,4})[ \t]*")
_LINE_END = "\n"
_MAX_PORT = 65535
# the shape of a prefix, without netmasks, zones and spaces, which ipaddress would accept
_RANGE = re.compile(r"[0-9A-Fa-f:.]+/(?:[0-9]|[1-9][0-9]{1,2})")
# at most 15 characters: IFNAMSIZ less the NUL
_INTERFACE = re.compile(r"[a-zA-Z][a-zA-Z0-9_.\-]{0,14}")
_LONGEST_QUOTE = 80

Mode = Literal["REDIRECT", "TPROXY"]
Network = IPv4Network | IPv6Network
# what is done about what leaves past the proxy although no annotation asks for it
OnUncaptured = Literal["allow", "audit", "deny"]


class CapturePolicy(BaseModel):
    """What to capture for one Pod. The defaults are the policy of a Pod without annotations."""

    model_config = ConfigDict(frozen=True)

    mode: Mode = "REDIRECT"
    outbound_all: bool = True
    include_outbound: tuple[Network, ...] = ()
    exclude_outbound: tuple[Network, ...] = ()
    include_outbound_ports: frozenset[int] = frozenset()
    exclude_outbound_ports: frozenset[int] = frozenset((15020,))
    inbound_all: bool = True
    include_inbound_ports: frozenset[int] = frozenset()
    exclude_inbound_ports: frozenset[int] = ALWAYS_EXCLUDED_INBOUND
    exclude_interfaces: tuple[str, ...] = ()
    reroute_interfaces: tuple[str, ...] = ()
    proxy_uid: int = PROXY_ID
    proxy_gid: int = PROXY_ID
    dns_capture: bool = False
    dual_stack: bool = False
    invalid_drop: bool = False
    loopback_included: bool = False
    early_outbound: bool = False
    late_outbound: bool = False
    strict_proxy: bool = False
    deny_outbound_ports: frozenset[int] = frozenset()
    deny_inbound_ports: frozenset[int] = frozenset()
    uncaptured: OnUncaptured = "allow"
    live: bool = False  # whether the pod follows FOLLOWED while it runs
    acceleration: Level = Level.PROXY  # the lowest of this level, the node's and the other pod's counts

    @property
    def rules(self) -> int:
        """How many ports and ranges the policy names."""
        lists = (getattr(self, name) for name in type(self).model_fields)
        return sum(len(each) for each in lists if isinstance(each, tuple | frozenset))


def policy_of(pod: Pod, uncaptured: OnUncaptured = "allow", live: bool = False) -> CapturePolicy:
    """The policy that a Pod's annotations and its proxy container ask for.

    `uncaptured` and `live` are the node's defaults for UNCAPTURED and LIVE_POLICY.
    Raises InvalidAnnotation if Istio would refuse a value, or if a value asks for what cannot be done with sockets.
    As in Istio, a value in the environment that is not a boolean counts as false.
    """
    values = _DEFAULTS | pod.annotations
    proxy = pod.proxy or Container(name="")
    # if the annotation with the newer name is there, the older one does not count
    reroute = REROUTE_INTERFACES if REROUTE_INTERFACES in pod.annotations else KUBEVIRT_INTERFACES

    policy = CapturePolicy(
        **_followed(pod, uncaptured, live),
        mode=_mode(values),
        exclude_interfaces=_interfaces(values, EXCLUDE_INTERFACES),
        reroute_interfaces=_interfaces(values, reroute),
        # 0 means "not set", as in Istio: a proxy that runs as root is recognised by its group
        proxy_uid=proxy.security_context.run_as_user or PROXY_ID,
        proxy_gid=proxy.security_context.run_as_group or PROXY_ID,
        dns_capture=parse_bool(proxy.env_value(DNS_CAPTURE)) or False,
        dual_stack=parse_bool(proxy.env_value(DUAL_STACK)) or False,
        invalid_drop=parse_bool(proxy.env_value(INVALID_DROP)) or False,
        early_outbound=_allows(pod.annotations, EARLY_OUTBOUND),
        late_outbound=_allows(pod.annotations, LATE_OUTBOUND),
        strict_proxy=_boolean(pod.annotations, STRICT_PROXY),
        deny_outbound_ports=_ports(values, DENY_OUTBOUND_PORTS),
        deny_inbound_ports=_ports(values, DENY_INBOUND_PORTS),
        acceleration=_acceleration(pod.annotations),
    )
    refuse_unsupported(policy)
    return policy


def followed_of(pod: Pod, uncaptured: OnUncaptured = "allow", live: bool = False) -> CapturePolicy:
    """The policy of the annotations in FOLLOWED alone: all else is as in a Pod without annotations.

    Raises InvalidAnnotation if one of them is refused, whatever the others are.
    """
    return CapturePolicy(**_followed(pod, uncaptured, live))


def is_live(pod: Pod, default: bool = False) -> bool:
    """Whether a Pod wants its annotations followed while it runs. Raises InvalidAnnotation."""
    return _boolean(pod.annotations, LIVE_POLICY, default)


def denied_ports(pod: Pod) -> tuple[frozenset[int], frozenset[int]]:
    """The ports that a Pod denies now: outbound and inbound. Raises InvalidAnnotation.

    Every running pod follows these.
    """
    values = _DEFAULTS | pod.annotations
    return _ports(values, DENY_OUTBOUND_PORTS), _ports(values, DENY_INBOUND_PORTS)


def refuse_unsupported(policy: CapturePolicy) -> None:
    """Refuse a Pod that asks for something that Istio does with packets and that cannot be done with sockets.

    To capture only a part of the Pod's traffic would be worse. Raises InvalidAnnotation.
    """
    if policy.reroute_interfaces:
        names = quoted(",".join(policy.reroute_interfaces))
        raise InvalidAnnotation(
            f"{REROUTE_INTERFACES} (or its older name {KUBEVIRT_INTERFACES}): {names} "
            "asks to capture the packets of a virtual machine in the pod; sidestep captures sockets, and these packets "
            "have none. Remove the annotation, or run this Pod on a node with Istio's own CNI plugin",
            REROUTE_INTERFACES,
        )


def _followed(pod: Pod, uncaptured: OnUncaptured, live: bool) -> dict[str, Any]:
    """The fields that the annotations in FOLLOWED decide about."""
    values = _DEFAULTS | pod.annotations
    outbound_all = values[INCLUDE_OUTBOUND_RANGES] == _ALL
    inbound_all = values[INCLUDE_INBOUND_PORTS] == _ALL
    included = [] if outbound_all else _ranges(values, INCLUDE_OUTBOUND_RANGES)
    return {
        "outbound_all": outbound_all,
        "include_outbound": tuple(each.network for each in included),
        "exclude_outbound": tuple(each.network for each in _ranges(values, EXCLUDE_OUTBOUND_RANGES)),
        "include_outbound_ports": _ports(values, INCLUDE_OUTBOUND_PORTS),
        "exclude_outbound_ports": _ports(values, EXCLUDE_OUTBOUND_PORTS),
        "inbound_all": inbound_all,
        "include_inbound_ports": frozenset() if inbound_all else _ports(values, INCLUDE_INBOUND_PORTS),
        "exclude_inbound_ports": _excluded_inbound(values) | ALWAYS_EXCLUDED_INBOUND,
        "loopback_included": any(_is_loopback(each.ip) for each in included),
        "uncaptured": _uncaptured(pod.annotations, uncaptured),
        "live": is_live(pod, live),
    }


def _allows(annotations: Mapping[str, str], key: str) -> bool:
    value = annotations.get(key)
    if value not in (None, "allow"):
        raise _invalid(key, value, "a choice", "give allow, or remove it")
    return value == "allow"


def _boolean(annotations: Mapping[str, str], key: str, default: bool = False) -> bool:
    value = annotations.get(key)
    if value is None:
        return default
    parsed = parse_bool(value)
    if parsed is None:
        raise _invalid(key, value, "a boolean", "give true or false")
    return parsed


def _acceleration(annotations: Mapping[str, str]) -> Level:
    value = annotations.get(ACCELERATION, str(Level.PROXY))
    try:
        return LEVELS[value]
    except KeyError:
        raise _invalid(ACCELERATION, value, "a level of acceleration", f"give {', '.join(LEVELS)}") from None


def _uncaptured(annotations: Mapping[str, str], default: OnUncaptured) -> OnUncaptured:
    value = annotations.get(UNCAPTURED, default)
    if value not in get_args(OnUncaptured):
        raise _invalid(UNCAPTURED, value, "a choice", f"give {', '.join(get_args(OnUncaptured))}")
    return cast(OnUncaptured, value)


def _mode(values: Mapping[str, str]) -> Mode:
    mode = values[INTERCEPTION_MODE]
    if mode not in ("REDIRECT", "TPROXY"):
        raise _invalid(INTERCEPTION_MODE, mode, "an interception mode", "give REDIRECT or TPROXY")
    return cast(Mode, mode)


def _ports(values: Mapping[str, str], key: str) -> frozenset[int]:
    return frozenset(_port(key, each) for each in _elements(values[key]))


def _excluded_inbound(values: Mapping[str, str]) -> frozenset[int]:
    """The ports of the one list that Istio trims, because it appends its own ports to it."""
    return _ports({EXCLUDE_INBOUND_PORTS: values[EXCLUDE_INBOUND_PORTS].strip(_SPACE)}, EXCLUDE_INBOUND_PORTS)


def _port(key: str, text: str) -> int:
    found = _PORT.fullmatch(text)
    if not found or int(found[1]) > _MAX_PORT:
        raise _invalid(key, text, "a port", "give ports 0–65535 separated by commas")
    return int(found[1])


def _ranges(values: Mapping[str, str], key: str) -> list[IPv4Interface | IPv6Interface]:
    """The prefixes of a list, each with its address as written, because it matters whether that is loopback."""
    return [_range(key, each) for each in _elements(values[key])]


def _range(key: str, text: str) -> IPv4Interface | IPv6Interface:
    try:
        if _RANGE.fullmatch(text):
            return IPv6Interface(text) if ":" in text else IPv4Interface(text)
    except ValueError:
        pass
    advice = "give prefixes such as 10.0.0.0/8 separated by commas without spaces"
    raise _invalid(key, text, "an IP range", advice)


def _interfaces(values: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(_interface(key, each) for each in _elements(values[key]))


def _interface(key: str, text: str) -> str:
    name = text.strip(_SPACE)
    if not _INTERFACE.fullmatch(name) or _LINE_END in text:
        advice = "give names of 1–15 letters, digits, _ . - that start with a letter"
        raise _invalid(key, text, "an interface name", advice)
    return name


def _elements(text: str) -> list[str]:
    return text.split(",") if text else []


def _is_loopback(address: IPv4Address | IPv6Address) -> bool:
    """Whether Go's netip takes an address for loopback: it treats IPv4-mapped as IPv4, as Python does since 3.13."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _invalid(key: str, text: str, what: str, advice: str) -> InvalidAnnotation:
    if _DEFAULTS.get(key) == _ALL:
        advice += f', or "{_ALL}" alone'
    return InvalidAnnotation(f"{key}: {quoted(text)} is not {what}; {advice}", key)


def quoted(text: str) -> str:
    """A value as messages quote it: shortened, with line breaks and invisible characters escaped."""
    shown = text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"
    quoted = json.dumps(shown, ensure_ascii=False)
    return "".join(each if each.isprintable() else _escaped(each) for each in quoted)


def _escaped(character: str) -> str:
    """A character as JSON escapes it. DEL, which JSON leaves alone, is escaped in the same way."""
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]
