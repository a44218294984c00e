"""Which agent looks after which node, and how it is asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import click

from installer.kubectl.kubectl import Kubectl

# the label and the container's name are those of istio-cni's DaemonSet, which has the same place in a cluster.
# Beside istio-cni, in shadow mode, the agents' label has another value
_LABEL, _SHADOW = "k8s-app", "sidestep-shadow-node"
_LABELS = f"{_LABEL} in (istio-cni-node, {_SHADOW})"
_CONTAINER = "install-cni"
_COMMAND = "sidestep"
_SIDECAR = "istio-proxy"


class NoAgent(click.ClickException):
    """Nobody can be asked about a node."""


@dataclass(frozen=True)
class Agent:
    """The agent's pod on one node. `image` is what its container runs."""

    kubectl: Kubectl
    node: str
    namespace: str
    pod: str
    image: str

    def ask(self, *argv: str) -> Any:
        """What `sidestep …` tells in JSON, whatever its exit status. Raises KubectlFailed."""
        return self.kubectl.told(*self._exec(), *argv, "--output", "json")

    def printed(self, *argv: str) -> bytes:
        """What `sidestep …` prints, byte by byte. Raises KubectlFailed."""
        return self.kubectl.printed(*self._exec(), *argv)

    def follow(self, *argv: str, is_endless: bool, has_terminal: bool) -> int:
        """Run `sidestep …` with this terminal; its exit status.

        A command that goes on until its reader has gone sees that by its input, which ends then.
        """
        options = ["--stdin"] * is_endless + ["--tty"] * (is_endless and has_terminal)
        return self.kubectl.follow(*self._exec(*options), *argv)

    def _exec(self, *options: str) -> list[str]:
        return ["exec", *options, "--namespace", self.namespace, self.pod, "--container", _CONTAINER, "--", _COMMAND]


@dataclass(frozen=True)
class Nodes:
    """The nodes by name, each with its agent or None."""

    agents: dict[str, Agent | None]

    @classmethod
    def of(cls, kubectl: Kubectl, namespace: str) -> "Nodes":
        """`namespace` is the agents', "" if it is to be found. Raises KubectlFailed."""
        where = ["--namespace", namespace] if namespace else ["--all-namespaces"]
        running = agents_pods(kubectl.items("pods", *where, "--selector", _LABELS))
        names = [node["metadata"]["name"] for node in kubectl.items("nodes")]
        return cls({name: _agent(kubectl, running[name]) if name in running else None for name in names})

    def agent_on(self, node: str) -> Agent:
        """Raises NoAgent."""
        if node not in self.agents:
            raise NoAgent(f"{node!r} is none of the nodes {', '.join(self.agents)}")
        if (found := self.agents[node]) is None:
            raise NoAgent(f"no agent runs on {node}; `kubectl get pods -A -l '{_LABELS}' -o wide` shows where they run")
        return found


def agents_pods(pods: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The agents' Pods by node, of all that have their labels.

    Beside an agent in shadow mode is istio-cni's. Where one agent gives way to another, it is the one that stays.
    """
    running = [pod for pod in pods if pod["spec"].get("nodeName") and pod["status"].get("phase") == "Running"]
    return {pod["spec"]["nodeName"]: pod for pod in sorted(running, key=_rank)}


def _rank(pod: dict[str, Any]) -> tuple[bool, bool]:
    metadata = pod["metadata"]
    return "deletionTimestamp" not in metadata, metadata["labels"].get(_LABEL) == _SHADOW


def _agent(kubectl: Kubectl, pod: dict[str, Any]) -> Agent:
    metadata, spec = pod["metadata"], pod["spec"]
    image = next((each["image"] for each in spec["containers"] if each["name"] == _CONTAINER), "")
    return Agent(kubectl, spec["nodeName"], metadata["namespace"], metadata["name"], image)


def has_sidecar(pod: dict[str, Any]) -> bool:
    """Whether the Pod has a proxy of Istio's beside its application, in a network of its own."""
    spec = pod["spec"]
    names = [each["name"] for each in (*spec["containers"], *spec.get("initContainers", ()))]
    return _SIDECAR in names and not spec.get("hostNetwork", False)
