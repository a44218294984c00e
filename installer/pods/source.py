"""Opens the node's source of Pods: its directory of manifests, or the API server's watch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bpf.errors import SidestepError
from cni.pod import NoEvents, PodEvents, PodSource
from installer.pods.api import Api
from installer.pods.cluster import ClusterPods
from installer.pods.directory import PodDirectory
from installer.pods.events import ClusterEvents
from installer.settings import Node


@dataclass(frozen=True)
class Source:
    """Where Pods come from, and where what happens to them is told. Without API server the last two are None."""

    pods: PodSource
    events: PodEvents
    api: Api | None = None
    cluster: ClusterPods | None = None


def require_source(node: Node) -> None:
    """Raise SidestepError unless the settings name a source."""
    if node.pods is None and not node.kubernetes_node_name:
        raise SidestepError("nowhere to get Pods from; give --pods DIR or --kubernetes-node-name NAME")


@contextmanager
def source_of(node: Node, on_request: Callable[[str, int], None]) -> Iterator[Source]:
    """The source that the settings name, watching meanwhile. Raises ApiFailed when its configuration is unusable."""
    if node.pods is not None:
        yield Source(PodDirectory(node.pods), NoEvents())
        return
    api = Api.of(node, on_request)
    cluster = ClusterPods(api, node.kubernetes_node_name)
    events = ClusterEvents(api, node.kubernetes_node_name)
    with ExitStack() as running:
        running.enter_context(events.running())
        running.enter_context(cluster.running())
        yield Source(cluster, events, api, cluster)
