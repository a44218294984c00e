"""Pods of the checks: each is a server that tells what it was sent, and a client that kubectl tells what to ask."""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Reply:
    """What came back: the server's name and what it saw, or how the client failed."""

    server: str
    seen: Mapping[str, str]
    error: str = ""

    @property
    def identities(self) -> str:
        """Who proxies say is calling whom: the header X-Forwarded-Client-Cert, which only mTLS brings."""
        return self.seen.get("HTTP_X_FORWARDED_CLIENT_CERT", "")


class Pods:
    """Those of one cluster."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def make(self, pod: PodName, node: str) -> None:
        """On that node, with its Service and service account."""
        metadata = {"name": pod.name, "namespace": pod.namespace, "labels": {"app": pod.name}}
        container = {
            "name": "app",
            "image": images.TOOLS,
            "command": ["/bin/sh", "-c", _SERVE],
            "ports": [{"containerPort": PORT}],
            "readinessProbe": {"httpGet": {"path": "/cgi-bin/seen", "port": PORT}, "periodSeconds": 1},
        }
        service = {"selector": {"app": pod.name}, "ports": [{"name": "http", "port": PORT}]}
        spec = {
            "serviceAccountName": pod.name,
            "nodeName": node,
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
        }
        self._control.apply(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        )

    def wait_until_ready(self, *pods: PodName) -> None:
        """Each of them."""
        for pod in pods:
            self._control.wait("condition=Ready", f"pod/{pod.name}", f"--namespace={pod.namespace}")

    def get(self, pod: PodName) -> Any:
        """As the API server has it."""
        return self._control.get("pod", "-n", pod.namespace, pod.name)

    def ip(self, pod: PodName) -> str:
        """Its first address."""
        return str(self.get(pod)["status"]["podIP"])

    def ask(self, client: PodName, host: str) -> Reply:
        """One HTTP request from inside the client's container, by name or address."""
        fetch = ["timeout", "10", "wget", "-q", "-O", "-", f"http://{host}:{PORT}/cgi-bin/seen"]
        try:
            told = self._control.kubectl("exec", "-n", client.namespace, client.name, "-c", "app", "--", *fetch)
        except CommandFailed as error:
            return Reply("", {}, str(error))
        server, *lines = told.splitlines() or [""]
        return Reply(server, dict(line.partition("=")[::2] for line in lines))
