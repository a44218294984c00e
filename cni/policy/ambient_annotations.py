"""What an ambient Pod's annotations ask of its capture."""

from dataclasses import replace

import structlog

from cni.errors import InvalidAnnotation
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import REROUTE_INTERFACES, quoted
from cni.policy.pod import Pod, parse_bool

log = structlog.get_logger("ambient")

BYPASS_INBOUND = "ambient.istio.io/bypass-inbound-capture"
DNS_CAPTURE = "ambient.istio.io/dns-capture"


def ambient_policy_of(pod: Pod, defaults: AmbientPolicy) -> AmbientPolicy:
    """The policy that a Pod's annotations ask for; `defaults` are the node's, where they say nothing.

    As in Istio, a value that is not a boolean counts as absent, and is logged. Raises InvalidAnnotation if the Pod asks
    for what cannot be done with sockets.
    """
    _refuse_unsupported(pod)
    return replace(
        defaults,
        dns_capture=_boolean(pod, DNS_CAPTURE, defaults.dns_capture),
        bypass_inbound_capture=_boolean(pod, BYPASS_INBOUND, defaults.bypass_inbound_capture),
    )


def _boolean(pod: Pod, name: str, default: bool) -> bool:
    text = pod.annotations.get(name)
    found = parse_bool(text)
    if text is not None and found is None:
        log.warning(
            "annotation.ignored",
            pod=f"{pod.namespace}/{pod.name}",
            problem=f"{name}: {quoted(text)} is not a boolean; give true or false",
            consequence=f"the node's default, {str(default).lower()}, counts",
        )
    return default if found is None else found


def _refuse_unsupported(pod: Pod) -> None:
    text = pod.annotations.get(REROUTE_INTERFACES, "")
    if any(each.strip() for each in text.split(",")):
        raise InvalidAnnotation(
            f"{REROUTE_INTERFACES}: {quoted(text)} asks to capture the packets of a virtual machine in the pod; "
            "sidestep captures sockets, and these packets have none. Remove the annotation, or run this Pod on a node "
            "with Istio's own CNI plugin",
            REROUTE_INTERFACES,
        )
