"""A policy in Istio's words: the annotations and the fields of the proxy's container that would give it."""

from collections.abc import Iterable
from ipaddress import ip_network

from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from cni.policy import annotations as istio
from cni.policy.ambient_annotations import BYPASS_INBOUND, DNS_CAPTURE
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import ALWAYS_EXCLUDED_INBOUND, CapturePolicy, Network
from cni.policy.decision import Action
from cni.policy.prefixes import effective_prefixes

# verdict → who receives the connection, and at which port
LISTENERS: dict[Action, tuple[str, int]] = {
    "proxy-outbound": ("the proxy's outbound listener", OUTBOUND_PORT),
    "proxy-inbound": ("the proxy's inbound listener", INBOUND_PORT),
    "dns": ("pilot-agent's resolver", 15053),
}
# our names for two fields of the proxy's container
RUN_AS_USER, RUN_AS_GROUP = "securityContext.runAsUser", "securityContext.runAsGroup"
# a prefix that makes a policy include loopback, but captures nothing itself: rule O7 comes first
_LOOPBACK = ip_network("127.0.0.1/32")


def annotations_of(policy: CapturePolicy) -> dict[str, str]:
    """Every annotation that has an effect, with a value that gives this policy. If the default does, it is that."""
    return {
        istio.INTERCEPTION_MODE: policy.mode,
        istio.INCLUDE_OUTBOUND_RANGES: "*" if policy.outbound_all else _joined(_included(policy)),
        istio.EXCLUDE_OUTBOUND_RANGES: _joined(policy.exclude_outbound),
        istio.INCLUDE_OUTBOUND_PORTS: _joined(sorted(policy.include_outbound_ports)),
        istio.EXCLUDE_OUTBOUND_PORTS: _joined(sorted(policy.exclude_outbound_ports)),
        istio.INCLUDE_INBOUND_PORTS: "*" if policy.inbound_all else _joined(sorted(policy.include_inbound_ports)),
        # three are always excluded; the default names one of them
        istio.EXCLUDE_INBOUND_PORTS: _joined(sorted(policy.exclude_inbound_ports - ALWAYS_EXCLUDED_INBOUND)) or "15020",
        istio.EXCLUDE_INTERFACES: _joined(policy.exclude_interfaces),
        istio.EARLY_OUTBOUND: "allow" if policy.early_outbound else "",
        istio.LATE_OUTBOUND: "allow" if policy.late_outbound else "",
        istio.DENY_OUTBOUND_PORTS: _joined(sorted(policy.deny_outbound_ports)),
        istio.DENY_INBOUND_PORTS: _joined(sorted(policy.deny_inbound_ports)),
        istio.STRICT_PROXY: _boolean(policy.strict_proxy),
        istio.UNCAPTURED: policy.uncaptured,
        istio.LIVE_POLICY: _boolean(policy.live),
        istio.ACCELERATION: str(policy.acceleration),
    }


def proxy_of(policy: CapturePolicy) -> dict[str, str]:
    """The same for the istio-proxy container: its environment and securityContext."""
    return {
        istio.DNS_CAPTURE: _boolean(policy.dns_capture),
        istio.DUAL_STACK: _boolean(policy.dual_stack),
        RUN_AS_USER: str(policy.proxy_uid),
        RUN_AS_GROUP: str(policy.proxy_gid),
    }


def ambient_words(policy: AmbientPolicy) -> dict[str, str]:
    """The same for a Pod in ambient mode."""
    return {
        DNS_CAPTURE: _boolean(policy.dns_capture),
        BYPASS_INBOUND: _boolean(policy.bypass_inbound_capture),
    }


def is_default(name: str, value: str) -> bool:
    """Whether a Pod without this annotation or field gets the same value."""
    return _DEFAULTS.get(name) == value


def as_kept(policy: CapturePolicy) -> CapturePolicy:
    """The policy reduced to what has an effect. The maps keep no more."""
    prefixes = effective_prefixes(policy)
    kept: dict[str, object] = {
        "include_outbound": tuple(each.network for each in prefixes if each.verdict == "include"),
        "exclude_outbound": tuple(each.network for each in prefixes if each.verdict == "exclude"),
        "exclude_interfaces": tuple(dict.fromkeys(policy.exclude_interfaces)),
        "invalid_drop": False,
    }
    if not policy.inbound_all:
        kept["exclude_inbound_ports"] = ALWAYS_EXCLUDED_INBOUND
    return policy.model_copy(update=kept)


def part_of(policy: CapturePolicy, name: str, port: int, network: Network | None) -> str:
    """The element of an annotation's list that a port or address matches; "" if there is none."""
    elements = {
        istio.INCLUDE_OUTBOUND_PORTS: policy.include_outbound_ports,
        istio.EXCLUDE_OUTBOUND_PORTS: policy.exclude_outbound_ports,
        istio.INCLUDE_INBOUND_PORTS: policy.include_inbound_ports,
        istio.EXCLUDE_INBOUND_PORTS: policy.exclude_inbound_ports,
        istio.DENY_OUTBOUND_PORTS: policy.deny_outbound_ports,
        istio.DENY_INBOUND_PORTS: policy.deny_inbound_ports,
    }
    ranges = {
        istio.INCLUDE_OUTBOUND_RANGES: policy.include_outbound,
        istio.EXCLUDE_OUTBOUND_RANGES: policy.exclude_outbound,
    }
    if name in elements:
        return str(port) if port in elements[name] else ""
    fitting = (each for each in ranges.get(name, ()) if network is not None and _is_within(network, each))
    return str(max(fitting, key=lambda each: each.prefixlen, default=""))


def _included(policy: CapturePolicy) -> tuple[Network, ...]:
    """The included ranges. The maps drop a loopback prefix if another prefix covers it; here it comes back."""
    is_shown = any(each.network_address.is_loopback for each in policy.include_outbound)
    return (
        policy.include_outbound if is_shown or not policy.loopback_included else (*policy.include_outbound, _LOOPBACK)
    )


def _is_within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _joined(elements: Iterable[object]) -> str:
    return ",".join(map(str, elements))


def _boolean(value: bool) -> str:
    return "true" if value else "false"


_DEFAULTS = annotations_of(CapturePolicy()) | proxy_of(CapturePolicy())
