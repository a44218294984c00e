"""sidestep in the cluster, installed as docs/operations.md says, and what is asked of it by kubectl."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.cluster import Cluster, is_ready
from tests.lab.node import REPOSITORY

IMAGE = REPOSITORY / "build" / "image" / "sidestep.tar"
NAMESPACE, DAEMONSET = "istio-system", "istio-cni-node"
_NAMES = {"name": "sidestep", "newName": "localhost/sidestep", "newTag": "latest"}  # image/build.sh
_SECONDS = 240  # the first start compiles the programs and runs the self-test


class Sidestep:
    """The DaemonSet's."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._control = cluster, cluster.control

    def install(self) -> None:
        """By an overlay of its own over the base; its pods are Ready on every node afterwards."""
        manifests = shutil.copytree(REPOSITORY / "manifests", self._cluster.directory / "manifests")
        own = {"resources": ["../../base"], "components": ["../../components/namespace"], "images": [_NAMES]}
        self._apply(manifests / "overlays" / "own", own)
        rollout = ["rollout", "status", f"daemonset/{DAEMONSET}", "-n", NAMESPACE, f"--timeout={_SECONDS}s"]
        self._control.kubectl(*rollout)

    def is_ready_on(self, node: str) -> bool:
        """Whether an agent is."""
        return any(pod["spec"].get("nodeName") == node and is_ready(pod) for pod in self._pods())

    def is_attached(self, node: str) -> bool:
        """What `sidestep status` says; it fails if it finds something wrong."""
        return bool(self.ask_json(node, "status")["attached"])

    def captures(self, node: str, pod: str) -> bool:
        """Whether `sidestep pods` lists it, by NAMESPACE/NAME."""
        return pod in [each["pod"] for each in self.ask_json(node, "pods")]

    def ask(self, node: str, *argv: str) -> str:
        """What `sidestep …` prints in the agent's container on that node. Raises CommandFailed."""
        pod = next(pod["metadata"]["name"] for pod in self._pods() if pod["spec"].get("nodeName") == node)
        return self._control.kubectl("exec", "-n", NAMESPACE, pod, "-c", "install-cni", "--", "sidestep", *argv)

    def ask_json(self, node: str, *argv: str) -> Any:
        """The same, as JSON."""
        return json.loads(self.ask(node, *argv, "--output", "json"))

    def _apply(self, overlay: Path, kustomization: dict[str, Any]) -> None:
        overlay.mkdir()
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        self._control.kubectl("apply", "-k", overlay)

    def _pods(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._control.get("pods", "-n", NAMESPACE, "-l", f"k8s-app={DAEMONSET}")
        return found
