"""The node's source of Pods: its directory of manifests, or the API server's watch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bpf.errors import SidestepError
from cni.policy.pod import NoEvents, PodEvents, PodSource
from installer.pods.api import Api, OnRequest
from installer.pods.cluster import ClusterPods, Listener
from installer.pods.directory import PodDirectory
from installer.pods.pod_events import ClusterEvents
from installer.settings import Node


@dataclass(frozen=True)
class Source:
    """The source of Pods and the receiver of Events. Parts that belong to the other kind of source are None."""

    pods: PodSource
    events: PodEvents
    api: Api | None = None
    cluster: ClusterPods | None = None
    cluster_events: ClusterEvents | None = None
    directory: PodDirectory | None = None

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` at each change of a cluster's Pods. Changes in a directory are left to the rounds."""
        if self.cluster:
            self.cluster.subscribe(listener)

    def subscribe_always(self, listener: Listener) -> None:
        """Call `listener` at each change, also of a directory's Pods."""
        if self.directory:
            self.directory.subscribe(listener)
        else:
            self.subscribe(listener)

    def on_synced(self, call: Callable[[], None]) -> None:
        """Call `call` when the Pods are known: at once for a directory, after the first list for a cluster."""
        if self.cluster:
            self.cluster.on_synced(call)
        else:
            call()

    def wait_synced(self, seconds: float) -> bool:
        """Wait until the Pods are known; False if they are not in time."""
        return self.cluster is None or self.cluster.wait_synced(seconds)

    def why_stale(self) -> str:
        """Why the Pods are not known as they are now; "" if they are."""
        if self.cluster:
            return self.cluster.why_stale()
        return "" if self.directory is None or self.directory.every() is not None else "the directory can't be read"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch Pods and send Events until the context ends."""
        with ExitStack() as running:
            for part in (self.cluster_events, self.cluster, self.directory):
                if part:
                    running.enter_context(part.running())
            yield


def require_source(node: Node) -> None:
    """Raise SidestepError unless the settings name a source of Pods."""
    if node.pods is None and not node.kubernetes_node_name:
        raise SidestepError("nowhere to get Pods from; give --pods DIR or --kubernetes-node-name NAME")


def source_of(node: Node, on_request: OnRequest) -> Source:
    """The source that the settings name. Raises ApiFailed if they don't lead to an API server."""
    if node.pods is not None:
        directory = PodDirectory(node.pods)
        return Source(directory, NoEvents(), directory=directory)
    api = Api.of(node, on_request)
    cluster = ClusterPods(api, node.kubernetes_node_name)
    events = ClusterEvents(api, node.kubernetes_node_name)
    return Source(cluster, events, api, cluster, events)
