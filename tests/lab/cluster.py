"""An API server over TLS, and the agent's side of it in the same process."""

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trustme
from kubernetes.client.configuration import Configuration

from installer.pods.access import access_of
from installer.pods.api import Api
from installer.pods.cluster import ClusterPods
from installer.settings import Node
from tests.lab.apiserver import ApiServer
from tests.lab.waiting import wait_until

NODE = "here"
LIST, WATCH = "GET /api/v1/pods", "WATCH /api/v1/pods"


def manifest(name: str, node: str = NODE, **metadata: Any) -> dict[str, Any]:
    """A Pod as small as can be."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": str(uuid.uuid4()), **metadata},
        "spec": {"nodeName": node, "containers": [{"name": "app"}]},
    }


class World:
    """A server, the Api that speaks with it, and the cache it feeds once started."""

    def __init__(self, directory: Path, running: ExitStack) -> None:
        self.running = running
        self.authority = trustme.CA()
        self.server = running.enter_context(ApiServer(authority=self.authority).running())
        self.kubeconfig = self.server.kubeconfig(directory / "kubeconfig")
        self.requests: list[tuple[str, int]] = []
        self.api = self.reach(access_of(Node(kubeconfig=self.kubeconfig)))
        self.pods = ClusterPods(self.api, NODE)

    def reach(self, configure: Callable[[], Configuration]) -> Api:
        """The server by another way than the kubeconfig."""
        api = Api(configure, lambda verb, status: self.requests.append((verb, status)))
        self.running.callback(api.close)
        return api

    def start(self) -> None:
        """List and watch."""
        self.running.enter_context(self.pods.running())
        assert self.pods.wait_synced(5)
        wait_until(lambda: self.server.watchers == 1 and self.asked()["watch"] == 1, "the watch", 5)

    def names(self) -> set[str]:
        """Of the Pods in the cache."""
        return {pod.name for pod in self.pods.every() or []}

    def wait_for(self, *names: str, seconds: float = 10) -> None:
        """Until the cache has these and no others."""
        wait_until(lambda: self.names() == set(names), f"exactly {names} in the cache, not {self.names()}", seconds)

    def asked(self) -> Counter[str]:
        """How many requests the agent has made so far, by verb."""
        return Counter(verb for verb, _ in self.requests)


def threads_and_descriptors() -> tuple[int, int]:
    """How many this process has."""
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
