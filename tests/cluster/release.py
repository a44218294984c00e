"""sidestep's Helm release in the cluster, installed as docs/helm.md says."""

from pathlib import Path

from tests.cluster.bed import Bed
from tests.cluster.builder import BIN
from tests.cluster.sets import sets
from tests.cluster.sidestep import IMAGE_NAME, NAMESPACE, Sidestep
from tests.lab.node import REPOSITORY

CHART = REPOSITORY / "manifests" / "charts" / "sidestep"
_NAME = "sidestep"
_OWN = (f"image={IMAGE_NAME}", "updateStrategy.rollingUpdate.maxUnavailable=100%")
_TIMEOUT = "--timeout=240s"  # the first start compiles the programs and runs the self-test


class Release:
    """One, by its name; `agents` are those of its DaemonSet, by default the bed's."""

    def __init__(self, bed: Bed, agents: Sidestep | None = None) -> None:
        self._bed, self._agents = bed, agents or bed.sidestep

    def install(self, *options: str) -> None:
        """Its pods are Ready on every node afterwards."""
        self._helm("upgrade", "--install", _NAME, CHART, *sets(_OWN), *options, "--wait", _TIMEOUT)
        self._agents.wait_until_rolled_out()

    def upgrade(self, **values: str) -> None:
        """With further values, of which a name has __ for a dot; the others stay."""
        self.change(**values)
        self._agents.wait_until_rolled_out()

    def change(self, **values: str) -> None:
        """The same, without waiting for the pods."""
        named = sets(f"{name.replace('__', '.')}={value}" for name, value in values.items())
        self._helm("upgrade", _NAME, CHART, "--reset-then-reuse-values", *named)

    def roll_back(self) -> None:
        """To the revision before."""
        self._helm("rollback", _NAME, "--wait", _TIMEOUT)
        self._agents.wait_until_rolled_out()

    def uninstall(self) -> None:
        """If it is there; its pods are gone afterwards."""
        names = [f"pod/{pod['metadata']['name']}" for pod in self._agents.pods()]
        self._helm("uninstall", _NAME, "--ignore-not-found", "--wait", _TIMEOUT)
        if names:
            self._bed.control.kubectl("wait", "--for=delete", "-n", NAMESPACE, _TIMEOUT, *names)

    def _helm(self, *argv: str | Path) -> str:
        control = self._bed.control
        return control.host.run([BIN / "helm", *argv, "--kubeconfig", control.kubeconfig, "--namespace", NAMESPACE])
