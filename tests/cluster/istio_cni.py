"""Istio's own CNI plugin in the cluster, from the unmodified chart in its module: with Istio's image, or with ours."""

from pathlib import Path

import yaml

from tests.cluster.builder import BIN, module_directory
from tests.cluster.cluster import Cluster
from tests.cluster.components import components
from tests.cluster.istio_images import HUB, TAG
from tests.cluster.mesh import NAMESPACE
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
        own = (f"global.hub={HUB}", f"global.tag={TAG}", "global.imagePullPolicy=IfNotPresent")
        sets = [word for value in (*own, *values) for word in ("--set", value)]
        self._helm("upgrade", "--install", RELEASE, self._chart(), *sets)
        rollout = ["rollout", "status", f"daemonset/{DAEMONSET}", "-n", NAMESPACE, f"--timeout={_SECONDS}s"]
        self._control.kubectl(*rollout)

    def uninstall(self) -> None:
        """The release and its pods are gone afterwards."""
        self._helm("uninstall", RELEASE, "--ignore-not-found", "--wait", f"--timeout={_SECONDS}s")
        gone = ["--for=delete", "-n", NAMESPACE, "pod", "-l", f"k8s-app={DAEMONSET}", f"--timeout={_SECONDS}s"]
        self._control.kubectl("wait", *gone)

    def image_by_istioctl(self, image: str) -> str:
        """Of the DaemonSet that istioctl would install with this value for the image; nothing is installed."""
        values = ("components.cni.enabled=true", f"values.cni.image={image}")
        sets = [word for value in values for word in ("--set", value)]
        generate: list[str | Path] = [
            BIN / "istioctl",
            "manifest",
            "generate",
            f"--manifests={self._manifests()}",
            *sets,
        ]
        made = filter(None, yaml.safe_load_all(self._control.host.run(generate)))
        (daemonset,) = (each for each in made if each["kind"] == "DaemonSet")
        return str(daemonset["spec"]["template"]["spec"]["containers"][0]["image"])

    def _chart(self) -> Path:
        return self._manifests() / "charts" / "istio-cni"

    def _manifests(self) -> Path:
        pilot = next(each for each in components() if each.name == "pilot-discovery")
        return module_directory(pilot) / "manifests"

    def _helm(self, *argv: str | Path) -> None:
        where: list[str | Path] = ["--kubeconfig", self._control.kubeconfig, "--namespace", NAMESPACE]
        self._control.host.run([BIN / "helm", *argv, *where])
