"""Istio in the cluster, installed by Helm from the charts in its module, with sidestep in its CNI plugin's place."""

import json
from pathlib import Path
from typing import Any

from tests.cluster.builder import BIN, module_directory
from tests.cluster.cluster import NODE_NAMES, Cluster
from tests.cluster.components import components
from tests.cluster.istio_images import HUB, TAG, make_istio_images

NAMESPACE = "istio-system"
VALUES: dict[str, Any] = {
    "global": {
        "hub": HUB,
        "tag": TAG,
        "imagePullPolicy": "IfNotPresent",
        "proxy": {"resources": {"requests": {"cpu": "10m", "memory": "32Mi"}}},  # two cores have room for many
    },
    "pilot": {
        "cni": {"enabled": True},
        # the first two are extensions of Istio's own Envoy, which another Envoy refuses
        "env": {
            "PILOT_ENABLE_ALPN_FILTER": "false",
            "PILOT_ENABLE_METADATA_EXCHANGE": "false",
            "ISTIO_DUAL_STACK": "true",
        },
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "autoscaleEnabled": False,
        # away from the node that reboots: the API server would go on asking a webhook that is gone for half a minute
        "nodeSelector": {"kubernetes.io/hostname": NODE_NAMES[0]},
    },
    "taint": {"enabled": True, "namespace": NAMESPACE},
    "telemetry": {"enabled": False},  # an extension too
    "meshConfig": {"accessLogFile": "/dev/stdout"},
}
DUAL_STACK = {
    "pilot": {"ipFamilyPolicy": "RequireDualStack"},
    "meshConfig": {"defaultConfig": {"proxyMetadata": {"ISTIO_DUAL_STACK": "true"}}},
}


WITHOUT_ACCESS_LOG = {"meshConfig": {"accessLogFile": ""}}


class Mesh:
    """One cluster's."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._control = cluster, cluster.control
        self._pilot = next(each for each in components() if each.name == "pilot-discovery")
        self._source = module_directory(self._pilot)

    @property
    def release(self) -> str:
        """Istio's, as its module has it."""
        return f"Istio {self._pilot.version}"

    def install(self, *changes: dict[str, Any]) -> None:
        """istiod serves afterwards, and injects sidecars into the pods of labelled namespaces.

        `changes` are values of its chart over those of every cluster: DUAL_STACK has proxies listen on both families.
        """
        self._cluster.import_images(make_istio_images(self._cluster.directory / "istio-images", self._source))
        self.install_charts(*changes)

    def install_charts(self, *changes: dict[str, Any]) -> None:
        """The same, where the images are."""
        values: list[str | Path] = []
        for number, each in enumerate((VALUES, *changes)):
            values += ["--values", _write(self._cluster.directory / f"istio-values-{number}.json", each)]
        charts = self._source / "manifests" / "charts"
        self._helm("istio-base", charts / "base")
        self._helm(
            "istiod",
            charts / "istio-control" / "istio-discovery",
            *values,
            "--wait",
            "--timeout=300s",
        )

    def make_namespace(self, name: str) -> None:
        """Pods in it get sidecars."""
        metadata = {"name": name, "labels": {"istio-injection": "enabled"}}
        self._control.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})

    def require(self, mode: str) -> None:
        """In the whole mesh: STRICT, PERMISSIVE or DISABLE. Proxies hear of it a little later."""
        metadata = {"name": "default", "namespace": NAMESPACE}
        spec = {"mtls": {"mode": mode}}
        kind = {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication"}
        self._control.apply({**kind, "metadata": metadata, "spec": spec})

    def _helm(self, release: str, chart: Path, *argv: str | Path) -> None:
        where: list[str | Path] = ["--kubeconfig", self._control.kubeconfig, "--namespace", NAMESPACE]
        # what is outside of the namespace outlives it, and istiod has written to that
        upgrade: list[str | Path] = [
            BIN / "helm",
            "upgrade",
            "--install",
            "--create-namespace",
            "--force-conflicts",
            release,
            chart,
        ]
        self._control.host.run([*upgrade, *where, *argv])


def _write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))
    return path
