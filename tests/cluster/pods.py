"""Pods of the checks: each is a server that tells what it was sent, and a client that kubectl tells what to ask."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.cluster.control_plane import ControlPlane
from tests.cluster.host import CommandFailed
from tests.lab import images

PORT = 8080
# busybox's httpd gives each header of the request to a CGI program as HTTP_…
_SERVE = (
    "mkdir -p /tmp/www/cgi-bin && cd /tmp/www/cgi-bin && printf '#!/bin/sh\\necho\\nhostname\\nenv\\n' > seen && "
    f"chmod 755 seen && exec httpd -f -p {PORT} -h /tmp/www"
)


SERVER: Mapping[str, Any] = MappingProxyType(
    {
        "name": "app",
        "image": images.TOOLS,
        "command": ["/bin/sh", "-c", _SERVE],
        "ports": [{"containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/cgi-bin/seen", "port": PORT}, "periodSeconds": 1},
    }
)
_KINDS = ("pod", "service", "serviceaccount")


class PodName(NamedTuple):
    """Its Service and its service account have the same name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def host(self) -> str:
        """The Service's, in every namespace."""
        return f"{self.name}.{self.namespace}"

    @property
    def spiffe(self) -> str:
        """Who it is to the mesh."""
        return f"spiffe://cluster.local/ns/{self.namespace}/sa/{self.name}"


@dataclass(frozen=True)
class Reply:
    """What came back: the server's name and what it saw, or how the client failed."""

    server: str
    seen: Mapping[str, str]
    error: str = ""

    @classmethod
    def of(cls, told: str) -> "Reply":
        """From what a server of these has answered."""
        server, *lines = told.splitlines() or [""]
        return cls(server, dict(line.partition("=")[::2] for line in lines))

    @property
    def identities(self) -> str:
        """Who proxies say is calling whom: the header X-Forwarded-Client-Cert, which only mTLS brings."""
        return self.seen.get("HTTP_X_FORWARDED_CLIENT_CERT", "")


class Pods:
    """Those of one cluster."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def make(
        self,
        pod: PodName,
        node: str,
        container: Mapping[str, Any] = SERVER,
        ports: Mapping[str, int] = MappingProxyType({"http": PORT}),
        annotations: Mapping[str, str] = MappingProxyType({}),
        **spec: Any,
    ) -> None:
        """On that node, with its Service for `ports` and its service account; `spec` is added to the Pod's."""
        self._control.apply(*account_and_service(pod, ports), pod_of(pod, node, container, annotations, **spec))

    def delete(self, *pods: PodName) -> None:
        """With their Services and service accounts; they are gone afterwards."""
        self._delete(pods)
        for namespace, names in _by_namespace(pods).items():
            self._control.kubectl("wait", "--for=delete", "-n", namespace, *(f"pod/{name}" for name in names))

    def leave(self, *pods: PodName) -> None:
        """The same, but they need not be gone when this returns: nobody makes pods with these names again."""
        self._delete(pods)

    def _delete(self, pods: Collection[PodName]) -> None:
        for namespace, names in _by_namespace(pods).items():
            whole = [f"{kind}/{name}" for name in names for kind in _KINDS]
            self._control.kubectl("delete", "--ignore-not-found", "--wait=false", "-n", namespace, *whole)

    def wait_until_ready(self, *pods: PodName) -> None:
        """Each of them."""
        for namespace, names in _by_namespace(pods).items():
            self._control.wait("condition=Ready", *(f"pod/{name}" for name in names), f"--namespace={namespace}")

    def get(self, pod: PodName) -> Any:
        """As the API server has it."""
        return self._control.get("pod", "-n", pod.namespace, pod.name)

    def ip(self, pod: PodName) -> str:
        """Its first address."""
        return str(self.get(pod)["status"]["podIP"])

    def ask(self, client: PodName, host: str) -> Reply:
        """One HTTP request from inside the client's container, by name or address."""
        try:
            return Reply.of(self.run(client, *fetching(host)))
        except CommandFailed as error:
            return Reply("", {}, str(error))

    def run(self, pod: PodName, *argv: str) -> str:
        """What a command prints in the pod's container `app`. Raises CommandFailed."""
        return self._control.kubectl("exec", "-n", pod.namespace, pod.name, "-c", "app", "--", *argv)

    def logs(self, pod: PodName, container: str) -> str:
        """What a container has printed."""
        return self._control.kubectl("logs", "-n", pod.namespace, pod.name, "-c", container)


def _by_namespace(pods: Collection[PodName]) -> dict[str, list[str]]:
    return {namespace: [pod.name for pod in pods if pod.namespace == namespace] for namespace, _ in pods}


def fetching(host: str) -> list[str]:
    """The command that asks a server, by name or address, and prints its answer."""
    return ["timeout", "10", "wget", "-q", "-O", "-", f"http://{host}:{PORT}/cgi-bin/seen"]


def account_and_service(pod: PodName, ports: Mapping[str, int], **spec: Any) -> list[dict[str, Any]]:
    """Those of a pod; `spec` is added to the Service's."""
    metadata = {"name": pod.name, "namespace": pod.namespace, "labels": {"app": pod.name}}
    named = [{"name": name, "port": port} for name, port in ports.items()]
    service = {"selector": {"app": pod.name}, "ports": named, **spec}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
    ]


def pod_of(
    pod: PodName, node: str, container: Mapping[str, Any], annotations: Mapping[str, str], **spec: Any
) -> dict[str, Any]:
    """The Pod as it is applied."""
    metadata = {"name": pod.name, "namespace": pod.namespace, "labels": {"app": pod.name}}
    own = {
        "serviceAccountName": pod.name,
        "nodeName": node,
        "containers": [dict(container)],
        "terminationGracePeriodSeconds": 1,
    }
    whole = {**metadata, "annotations": dict(annotations)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": whole, "spec": own | spec}
