"""istioctl in the cluster: it installs the control plane and the CNI plugin over what Helm has installed."""

import json
from pathlib import Path
from typing import Any

from tests.cluster.builder import BIN, module_directory
from tests.cluster.cluster import Cluster
from tests.cluster.components import components
from tests.cluster.mesh import VALUES

_SECONDS = 240


class Istioctl:
    """Of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        pilot = next(each for each in components() if each.name == "pilot-discovery")
        self._cluster, self._manifests = cluster, module_directory(pilot) / "manifests"

    def install(self, *values: str) -> None:
        """`istioctl install` with these, NAME=VALUE, and the mesh's own values; all is Ready afterwards."""
        words = self._with(values)
        ready = ["--skip-confirmation", f"--readiness-timeout={_SECONDS}s"]
        control = self._cluster.control
        control.host.run([BIN / "istioctl", "install", f"--kubeconfig={control.kubeconfig}", *ready, *words])

    def _with(self, values: tuple[str, ...]) -> list[str | Path]:
        sets = [word for value in values for word in ("--set", value)]
        return [f"--manifests={self._manifests}", "--filename", self._operator(), *sets]

    def _operator(self) -> Path:
        """The mesh's values as istioctl takes them; meshConfig and components have places of their own there."""
        spec: dict[str, Any] = {"profile": "minimal", "values": VALUES, "meshConfig": VALUES["meshConfig"]}
        written = self._cluster.directory / "operator.json"
        written.write_text(
            json.dumps({"apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator", "spec": spec})
        )
        return written
