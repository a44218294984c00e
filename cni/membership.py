"""Is this a mesh pod? Istio's reasons to leave a Pod alone, in Istio's order."""

from cni.pod import PROXY_CONTAINER, Pod, parse_bool

INIT_CONTAINER = "istio-init"
DISABLE_ENVOY = "DISABLE_ENVOY"
INJECT = "sidecar.istio.io/inject"
STATUS = "sidecar.istio.io/status"


def skip_reason(pod: Pod) -> str | None:
    """Why nothing is captured for this Pod, in a sentence for the log; None when it belongs to the mesh."""
    proxy = pod.proxy
    if any(container.name == INIT_CONTAINER for container in pod.containers):
        return f"the {INIT_CONTAINER} container sets up capture itself"
    if proxy and parse_bool(proxy.env_value(DISABLE_ENVOY)):
        return f"{DISABLE_ENVOY} is true: the {PROXY_CONTAINER} container runs no Envoy"
    if not proxy:
        return f"there is no {PROXY_CONTAINER} container"
    if (role := _role(proxy.args)) != "sidecar":
        return f"the proxy is a {role}, not a sidecar"
    # the label wins even when it is no boolean; then neither counts
    if parse_bool(pod.labels.get(INJECT, pod.annotations.get(INJECT))) is False:
        return f"{INJECT} is false"
    if STATUS not in pod.annotations:
        return f"there is no {STATUS} annotation: the injector has not seen the Pod"
    return None


def _role(args: tuple[str, ...]) -> str:
    """What `pilot-agent proxy <role>` runs as; gateways and waypoints are no sidecars."""
    is_named = len(args) > 1 and args[0] == "proxy" and args[1] != ""
    return args[1] if is_named else "sidecar"
