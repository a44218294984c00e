"""Is this a mesh pod? Istio's reasons to leave a Pod alone, in Istio's order."""

from collections.abc import Collection, Mapping

from cni.policy.pod import PROXY_CONTAINER, Pod, parse_bool

INIT_CONTAINER = "istio-init"
DISABLE_ENVOY = "DISABLE_ENVOY"
INJECT = "sidecar.istio.io/inject"
STATUS = "sidecar.istio.io/status"
# the DaemonSet keeps Istio's name, because istiod and istioctl look for it; beside Istio's, in shadow mode, it has
# another
AGENT_PREFIXES = ("istio-cni-node-", "sidestep-shadow-node-")

_HOST_NETWORK = "it uses the node's own network (hostNetwork)"
_NOT_INJECTED = f"there is no {STATUS} annotation: the injector has not seen the Pod"


def skip_unseen(
    namespace: str,
    name: str,
    agent_namespace: str,
    excluded: Collection[str],
    annotations: Mapping[str, str] | None = None,
) -> str | None:
    """Why nothing is captured for a sandbox, if the invocation alone shows it, in Istio's order. None: the Pod decides.

    The agent's own pod comes first, because it must start without an agent. `annotations` are all the Pod's annotations
    if the runtime passes them, otherwise None. The plugin applies the same rules without the agent (cni/shim/policy.c).
    """
    if agent_namespace and namespace == agent_namespace and name.startswith(AGENT_PREFIXES):
        return "the agent's own pod"
    if not name or not namespace:
        return "not a Kubernetes pod"
    if namespace in excluded:
        return f"namespace {namespace} is in exclude_namespaces"
    if annotations is not None and STATUS not in annotations:
        return _NOT_INJECTED
    return None


def skip_pod(pod: Pod, agent_namespace: str, excluded: Collection[str]) -> str | None:
    """Why nothing is captured for this Pod on a node with these settings; None if it is a mesh pod.

    ADD, reconciliation, repair and the commands all ask this.
    """
    unseen = skip_unseen(pod.namespace, pod.name, agent_namespace, excluded)
    return unseen or (_HOST_NETWORK if pod.spec.host_network else skip_reason(pod))


def has_sidecar(pod: Pod) -> bool:
    """Whether the Pod has a sidecar that captures traffic, whoever sets the capture up."""
    proxy = pod.proxy
    return bool(proxy and _role(proxy.args) == "sidecar" and not parse_bool(proxy.env_value(DISABLE_ENVOY)))


def skip_reason(pod: Pod) -> str | None:
    """Why nothing is captured for this Pod, as a sentence for the log; None if it is a mesh pod."""
    proxy = pod.proxy
    if any(container.name == INIT_CONTAINER for container in pod.containers):
        return f"the {INIT_CONTAINER} container sets up capture itself"
    if proxy and parse_bool(proxy.env_value(DISABLE_ENVOY)):
        return f"{DISABLE_ENVOY} is true: the {PROXY_CONTAINER} container runs no Envoy"
    if not proxy:
        return f"there is no {PROXY_CONTAINER} container"
    if (role := _role(proxy.args)) != "sidecar":
        return f"the proxy is a {role}, not a sidecar"
    # the label counts, not the annotation; if the label is not a boolean, neither counts
    if parse_bool(pod.labels.get(INJECT, pod.annotations.get(INJECT))) is False:
        return f"{INJECT} is false"
    if STATUS not in pod.annotations:
        return _NOT_INJECTED
    return None


def _role(args: tuple[str, ...]) -> str:
    """The role that `pilot-agent proxy <role>` runs as. Gateways and waypoints have other roles than "sidecar"."""
    is_named = len(args) > 1 and args[0] == "proxy" and args[1] != ""
    return args[1] if is_named else "sidecar"
