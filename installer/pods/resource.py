"""Collections of the API server that an agent lists and watches, narrowed down to the objects that it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from cni.policy.pod import Pod
from installer.pods.answers import Json, pod_of

T = TypeVar("T")

# name of Istio's DaemonSet. That of the agents has the same, because istiod and istioctl look for it; in shadow mode,
# which runs beside Istio's, the other
DAEMONSET, SHADOW_DAEMONSET = "istio-cni-node", "sidestep-shadow-node"
AGENT_CONTAINER = "install-cni"


@dataclass(frozen=True)
class Resource(Generic[T]):
    """A collection: its path, a field selector, and a function that reads each object (None: ignore the object).

    With `metadata_only` the server sends only the metadata of each object.
    """

    name: str
    path: str
    selector: str
    read: Callable[[Json], T | None]
    metadata_only: bool = False

    def accept(self, kind: str = "") -> str:
        """The Accept header; `kind` is "List" for a list. All servers since Kubernetes 1.15 know meta.k8s.io/v1."""
        if not self.metadata_only:
            return "application/json"
        return f"application/json;as=PartialObjectMetadata{kind};g=meta.k8s.io;v=v1,application/json"


@dataclass(frozen=True)
class DaemonSetIdentity:
    """The parts of a DaemonSet that count. A DaemonSet made again under the same name has another UID."""

    uid: str
    is_going: bool  # being deleted, while finalizers or dependents remain
    image: str = ""  # of the agent's container in the template; "" if it was not asked for
    runs_install_cni: bool = False  # whether that container's command is the one of Istio's chart


@dataclass(frozen=True)
class NamespaceLabels:
    """The parts of a namespace that count."""

    name: str
    labels: dict[str, str]


def namespaces() -> Resource[NamespaceLabels]:
    """All namespaces of the cluster, of which the server sends the metadata alone."""
    return Resource("namespaces", "/api/v1/namespaces", "", _namespace, metadata_only=True)


def pods_of(node_name: str) -> Resource[Pod]:
    """The pods of a node."""
    return Resource("pods", "/api/v1/pods", f"spec.nodeName={node_name}", pod_of)


def daemonset_of(namespace: str, name: str) -> Resource[DaemonSetIdentity]:
    """One DaemonSet, selected by name, so that a role for that name alone also allows list and watch."""
    path = f"/apis/apps/v1/namespaces/{quote(namespace)}/daemonsets"
    return Resource("daemonset", path, f"metadata.name={name}", _owner, metadata_only=True)


def _namespace(thing: Json) -> NamespaceLabels:
    metadata = thing.get("metadata") or {}
    labels = metadata.get("labels") or {}
    return NamespaceLabels(str(metadata.get("name") or ""), {str(key): str(value) for key, value in labels.items()})


def _owner(thing: Json) -> DaemonSetIdentity:
    metadata = thing.get("metadata") or {}
    spec = ((thing.get("spec") or {}).get("template") or {}).get("spec") or {}
    return DaemonSetIdentity(
        str(metadata.get("uid") or ""),
        bool(metadata.get("deletionTimestamp")),
        image_in(spec),
        _agent_in(spec).get("command") == [AGENT_CONTAINER],
    )


def image_in(spec: Json) -> str:
    """The image of the agent's container in a Pod's spec; "" if there is no such container."""
    return str(_agent_in(spec).get("image") or "")


def _agent_in(spec: Json) -> Json:
    return next((each for each in spec.get("containers") or () if each.get("name") == AGENT_CONTAINER), {})
