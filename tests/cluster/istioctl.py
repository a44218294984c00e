"""istioctl in the cluster: it installs the control plane and the CNI plugin over what Helm has installed."""

import json
from pathlib import Path

import yaml

from tests.cluster.builder import BIN
from tests.cluster.cluster import Cluster
from tests.cluster.istio_source import manifests
from tests.cluster.mesh import VALUES
from tests.cluster.sets import sets

WITH_PLUGIN, WITHOUT_PLUGIN = "components.cni.enabled=true", "components.cni.enabled=false"
_SECONDS = 240


def with_image(image: str) -> str:
    """The value that has another image stand in for Istio's plugin."""
    return f"values.cni.image={image}"


class Istioctl:
    """Of one cluster; whatever it makes has the mesh's own values too."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._control = cluster, cluster.control

    def install(self, *values: str) -> None:
        """`istioctl install` with these values, NAME=VALUE; all is Ready afterwards."""
        ready = ["--skip-confirmation", f"--readiness-timeout={_SECONDS}s"]
        self._run("install", f"--kubeconfig={self._control.kubeconfig}", *ready, values=values)

    def image(self, *values: str) -> str:
        """Of the DaemonSet that it would install with these values; nothing is installed."""
        made = filter(None, yaml.safe_load_all(self._run("manifest", "generate", values=values)))
        (daemonset,) = (each for each in made if each["kind"] == "DaemonSet")
        return str(daemonset["spec"]["template"]["spec"]["containers"][0]["image"])

    def _run(self, *command: str, values: tuple[str, ...]) -> str:
        with_mesh: list[str | Path] = [f"--manifests={manifests()}", "--filename", self._operator()]
        return self._control.host.run([BIN / "istioctl", *command, *with_mesh, *sets(values)])

    def _operator(self) -> Path:
        written = self._cluster.directory / "operator.json"
        kind = {"apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator"}
        written.write_text(json.dumps({**kind, "spec": {"profile": "minimal", "values": VALUES}}))
        return written
