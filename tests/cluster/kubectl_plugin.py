"""`kubectl sidestep` as a user has it: taken out of an agent, put on the PATH of the control plane's host."""

import json
import subprocess
from typing import Any

from tests.cluster.bed import Bed
from tests.cluster.builder import BIN
from tests.cluster.sidestep import DAEMONSET, NAMESPACE


class KubectlPlugin:
    """Of one cluster. It has no more than Debian's Python and kubectl."""

    def __init__(self, bed: Bed, daemonset: str = DAEMONSET) -> None:
        """Fetch it from an agent of this DaemonSet, as docs/operations.md says."""
        self._host, self._kubeconfig = bed.control.host, bed.control.kubeconfig
        self._file = bed.cluster.directory / "kubectl-sidestep"
        agent = ["exec", "-n", NAMESPACE, f"daemonset/{daemonset}", "--", "sidestep", "kubectl-plugin"]
        kubectl = [str(BIN / "kubectl"), f"--kubeconfig={self._kubeconfig}", *agent]
        done = subprocess.run(self._host.command(kubectl), capture_output=True, check=True)
        self._file.write_bytes(done.stdout)
        self._file.chmod(0o755)

    def run(self, *argv: str) -> tuple[int, str]:
        """`kubectl sidestep …`: its exit status, and all that it prints."""
        path = f"PATH={BIN}:{self._file.parent}:/usr/bin:/bin"
        command = ["env", path, f"KUBECONFIG={self._kubeconfig}", "kubectl", "sidestep", *argv]
        done = subprocess.run(
            self._host.command(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def told(self, *argv: str) -> Any:
        """What it prints with `--output json`. Raises ValueError if that is no JSON."""
        return json.loads(self.run(*argv, "--output", "json")[1])
