"""What is listed and watched: collections of the API server, narrowed down to what one agent is about."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from cni.policy.pod import Pod
from installer.pods.answers import Json, pod_of

T = TypeVar("T")

# the name of the agents' DaemonSet is Istio's, by which istiod and istioctl find it
DAEMONSET = "istio-cni-node"


@dataclass(frozen=True)
class Resource(Generic[T]):
    """A collection, the field by which some of it is chosen, and how each is read; None hides one from us.

    With `metadata_only` the server leaves out everything else of each.
    """

    name: str
    path: str
    selector: str
    read: Callable[[Json], T | None]
    metadata_only: bool = False

    def accept(self, kind: str = "") -> str:
        """What to accept; `kind` is List for a list (meta.k8s.io/v1, on all servers since 1.15)."""
        if not self.metadata_only:
            return "application/json"
        return f"application/json;as=PartialObjectMetadata{kind};g=meta.k8s.io;v=v1,application/json"


@dataclass(frozen=True)
class DaemonSetIdentity:
    """What counts of a DaemonSet: one made again under the same name has another UID."""

    uid: str
    is_going: bool  # deleted, but for what has to go before it


def pods_of(node_name: str) -> Resource[Pod]:
    """All pods of a node."""
    return Resource("pods", "/api/v1/pods", f"spec.nodeName={node_name}", pod_of)


def daemonset_of(namespace: str) -> Resource[DaemonSetIdentity]:
    """The agents' DaemonSet. A role that allows one name allows a list and a watch of just that name."""
    path = f"/apis/apps/v1/namespaces/{quote(namespace)}/daemonsets"
    return Resource("daemonset", path, f"metadata.name={DAEMONSET}", _owner, metadata_only=True)


def _owner(thing: Json) -> DaemonSetIdentity:
    metadata = thing.get("metadata") or {}
    return DaemonSetIdentity(str(metadata.get("uid") or ""), bool(metadata.get("deletionTimestamp")))
