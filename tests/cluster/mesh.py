"""Istio in the cluster, installed by Helm from the charts in its module, with sidestep in its CNI plugin's place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.builder import BIN
from tests.cluster.cluster import NODE_NAMES, Cluster
from tests.cluster.istio_images import HUB, TAG, make_istio_images
from tests.cluster.istio_source import manifests, source

NAMESPACE = "istio-system"
Values = Mapping[str, Any]  # of a Helm chart
VALUES: Values = {
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
        "taint": {"enabled": True, "namespace": NAMESPACE},
    },
    "telemetry": {"enabled": False},  # an extension too
    "meshConfig": {"accessLogFile": "/dev/stdout"},
}
# proxies listen on both families
DUAL_STACK: Values = {
    "pilot": {"ipFamilyPolicy": "RequireDualStack"},
    "meshConfig": {"defaultConfig": {"proxyMetadata": {"ISTIO_DUAL_STACK": "true"}}},
}

WITHOUT_ACCESS_LOG: Values = {"meshConfig": {"accessLogFile": ""}}


class Mesh:
    """One cluster's."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._control = cluster, cluster.control

    def install(self, *values: Values) -> None:
        """istiod serves afterwards, and injects sidecars into the pods of labelled namespaces.

        Of `values` for its chart, later ones win.
        """
        self._cluster.import_images(make_istio_images(self._cluster.directory / "istio-images", source()))
        self.install_charts(*values)

    def install_charts(self, *values: Values) -> None:
        """The same, where the images are."""
        self._helm("istio-base", "base")
        self._helm("istiod", "istio-control/istio-discovery", VALUES, *values)

    def install_gateway(self, kind: str, *values: Values) -> None:
        """Istio's own gateway, `ingress` or `egress`, which serves afterwards."""
        self._helm(f"istio-{kind}", f"gateways/istio-{kind}", {"global": VALUES["global"]}, *values)

    def make_namespace(self, name: str) -> None:
        """Pods in it get sidecars."""
        self._control.make_namespace(name, {"istio-injection": "enabled"})

    def require(self, mode: str) -> None:
        """In the whole mesh: STRICT, PERMISSIVE or DISABLE. Proxies hear of it a little later."""
        metadata = {"name": "default", "namespace": NAMESPACE}
        spec = {"mtls": {"mode": mode}}
        kind = {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication"}
        self._control.apply({**kind, "metadata": metadata, "spec": spec})

    def _helm(self, release: str, chart: str, *values: Values) -> None:
        where: list[str | Path] = ["--kubeconfig", self._control.kubeconfig, "--namespace", NAMESPACE]
        # what is outside of the namespace outlives it, and istiod has written to that
        how = [*where, "--create-namespace", "--force-conflicts", "--wait", "--timeout=300s"]
        for number, each in enumerate(values):
            file = self._cluster.directory / f"{release}-values-{number}.json"
            file.write_text(json.dumps(each))
            how += ["--values", file]
        self._control.host.run([BIN / "helm", "upgrade", "--install", release, manifests() / "charts" / chart, *how])
