"""Istio's own CNI plugin in the cluster, from the unmodified chart in its module: with Istio's image, or with ours."""

from pathlib import Path

from tests.cluster.builder import BIN
from tests.cluster.cluster import Cluster
from tests.cluster.istio_images import HUB, TAG
from tests.cluster.istio_source import manifests
from tests.cluster.mesh import NAMESPACE
from tests.cluster.sets import sets
from tests.lab.images import write_image

RELEASE, DAEMONSET = "istio-cni", "istio-cni-node"
_SECONDS = 240  # the first start of our agent compiles the programs and runs the self-test


class IstioCni:
    """The Helm release."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._control = cluster, cluster.control

    def import_image(self) -> None:
        """Istio's install-cni, with its plugin where that image has it (cni/deployments/…/Dockerfile.install-cni)."""
        archive = self._cluster.directory / "install-cni.tar"
        programs = {"usr/local/bin/install-cni": "install-cni", "opt/cni/bin/istio-cni": "istio-cni"}
        path = {"Env": ["PATH=/usr/local/bin:/bin"]}
        files = {place: BIN / name for place, name in programs.items()}
        write_image(archive, f"{HUB}/install-cni:{TAG}", files, path)
        self._cluster.import_images([archive])

    def install(self, *values: str) -> None:
        """`helm upgrade --install` with these values, NAME=VALUE; every node's agent is Ready afterwards."""
        images = (f"global.hub={HUB}", f"global.tag={TAG}", "global.imagePullPolicy=IfNotPresent")
        own = (*images, "updateStrategy.rollingUpdate.maxUnavailable=100%")
        chart = manifests() / "charts" / "istio-cni"
        self._helm("upgrade", "--install", RELEASE, chart, *sets((*own, *values)))
        rollout = ["rollout", "status", f"daemonset/{DAEMONSET}", "-n", NAMESPACE, f"--timeout={_SECONDS}s"]
        self._control.kubectl(*rollout)

    def uninstall(self) -> None:
        """The release and its pods are gone afterwards."""
        self._helm("uninstall", RELEASE, "--ignore-not-found", "--wait", f"--timeout={_SECONDS}s")
        gone = ["--for=delete", "-n", NAMESPACE, "pod", "-l", f"k8s-app={DAEMONSET}", f"--timeout={_SECONDS}s"]
        self._control.kubectl("wait", *gone)

    def _helm(self, *argv: str | Path) -> None:
        where: list[str | Path] = ["--kubeconfig", self._control.kubeconfig, "--namespace", NAMESPACE]
        self._control.host.run([BIN / "helm", *argv, *where])
