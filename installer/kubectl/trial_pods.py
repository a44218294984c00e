"""Throw-away mesh pods for `kubectl sidestep test`: a server and a client in each, in a namespace that goes again."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from installer.kubectl.agents import has_sidecar
from installer.kubectl.kubectl import Kubectl, KubectlFailed

PORT = 8080
APPLICATION = "app"
_PREFIX = "sidestep-test-"
_PYTHON = "/opt/venv/bin/python"  # of sidestep's image, which every node has
_TRIES = 10  # until istiod has told every proxy of the new pods
_USER = 1000  # any but the proxy's
# tells who has answered, and who has called it: a sidecar calls its application from 127.0.0.6
_SERVER = f"""
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        told = {{"server": os.environ["NAME"], "caller": self.client_address[0]}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("", {PORT}), Answer).serve_forever()
"""
_CLIENT = f"""
import sys, time, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
for left in reversed(range({_TRIES})):
    try:
        sys.stdout.write(opener.open(f"http://{{sys.argv[1]}}:{PORT}/", timeout=10).read().decode())
        break
    except OSError as error:
        if not left:
            sys.exit(str(error))
        time.sleep(1)
"""


class NotReady(click.ClickException):
    """The pods did not come up. The message says which, and why."""


@dataclass(frozen=True)
class TrialPod:
    """Its Service has the same name."""

    namespace: str
    name: str
    node: str
    address: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def host(self) -> str:
        """By which its Service is reached, an address or a name; what stands in a URL."""
        return f"{self.name}.{self.namespace}.svc"


@contextmanager
def trial_pods(
    kubectl: Kubectl, image: str, nodes: list[str], labels: dict[str, str], seconds: int
) -> Iterator[list[TrialPod]]:
    """One on each of `nodes`, all Ready; they and their namespace go at the end. Raises NotReady, KubectlFailed."""
    namespace = _PREFIX + secrets.token_hex(3)
    names = {f"pod-{number}": node for number, node in enumerate(nodes)}
    own = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
    try:
        kubectl.run("apply", "-f", "-", text=json.dumps(own))
        objects = [each for name, node in names.items() for each in (_service(name), _pod(name, node, image))]
        _apply_soon(kubectl, namespace, objects)
        yield _ready(kubectl, namespace, names, seconds)
    finally:
        kubectl.run("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")


def asked(kubectl: Kubectl, client: TrialPod, host: str) -> dict[str, str]:
    """The answer that a request of `client` gets. Raises KubectlFailed."""
    inside = ["--namespace", client.namespace, client.name, "--container", APPLICATION]
    told: dict[str, str] = kubectl.told("exec", *inside, "--", _PYTHON, "-c", _CLIENT, host)
    return told


def _apply_soon(kubectl: Kubectl, namespace: str, objects: list[dict[str, Any]]) -> None:
    """Once the namespace has its service account, without which no Pod is taken."""
    account = ["--for=create", "serviceaccount/default", "--namespace", namespace, "--timeout=30s"]
    kubectl.run("wait", *account)
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    kubectl.run("apply", "--namespace", namespace, "-f", "-", text=json.dumps(listed))


def _ready(kubectl: Kubectl, namespace: str, names: dict[str, str], seconds: int) -> list[TrialPod]:
    where = ["--namespace", namespace]
    try:
        kubectl.run("wait", *where, "--for=condition=Ready", "pod", "--all", f"--timeout={seconds}s")
    except KubectlFailed as error:
        waiting = "; ".join(filter(None, map(_why_not_ready, kubectl.items("pods", *where))))
        raise NotReady(f"after {seconds} s the pods are not ready: {waiting or error.message}") from None
    pods = kubectl.items("pods", *where)
    if bare := [each["metadata"]["name"] for each in pods if not has_sidecar(each)]:
        raise NotReady(f"{', '.join(bare)} got no sidecar; give --label with the label that asks your istiod for one")
    found = {each["metadata"]["name"]: each["status"]["podIP"] for each in pods}
    return [TrialPod(namespace, name, node, found[name]) for name, node in names.items()]


def _why_not_ready(pod: dict[str, Any]) -> str:
    """Which container waits, and the reason that kubelet gives; "" if the pod is ready."""
    status, name = pod["status"], pod["metadata"]["name"]
    if any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", ())):
        return ""
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    for each in containers:
        if waiting := each["state"].get("waiting"):
            return f"{name}: {each['name']}: {waiting.get('message') or waiting['reason']}"
    return f"{name}: {status.get('phase', 'Pending')}"


def _service(name: str) -> dict[str, Any]:
    ports = [{"name": "http", "port": PORT}]
    spec = {"selector": {"app": name}, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _pod(name: str, node: str, image: str) -> dict[str, Any]:
    """As a restricted namespace allows it."""
    container = {
        "name": APPLICATION,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": [_PYTHON, "-c", _SERVER],
        "env": [{"name": "NAME", "value": name}],
        "ports": [{"containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/", "port": PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": _USER, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {
        "nodeName": node,
        "containers": [container],
        "securityContext": security,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
    }
    metadata = {"name": name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
