"""Istio's own CNI plugin as the oracle: the real program asks an API server for the Pod and writes what it wants.

`python -m tests.cluster.builder istio-cni` builds it. Which tools it uses is a matter of what it finds on its PATH.
"""

import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

import trustme

from tests.cluster.builder import BIN
from tests.conformance.capture import claim
from tests.conformance.configs import Config
from tests.lab.apiserver import ApiServer
from tests.lab.chain import Attachment

PLUGIN = BIN / "istio-cni"
_KUBECONFIG = "istio-cni-kubeconfig"  # the name that the plugin looks for in its run directory


class Tools(StrEnum):
    """What the plugin writes its rules with."""

    NFT = "nft"
    LEGACY = "legacy"
    NFTABLES = "nftables"

    def programs(self) -> dict[str, str]:
        """The plugin's PATH: what it calls a program → what that is here.

        It takes iptables-nft before iptables, and iptables-legacy only where there are legacy rules already.
        """
        if self is Tools.NFTABLES:
            return {"nft": "nft"}
        suffix, called = ("-nft", "-nft") if self is Tools.NFT else ("-legacy", "")
        return {
            f"{family}{called}{action}": f"{family}{suffix}{action}"
            for family in ("iptables", "ip6tables")
            for action in ("", "-save", "-restore")
        }


class ByIstio:
    """Captures pods by the plugin; made by by_istio()."""

    def __init__(self, tools: Tools, directory: Path, api: ApiServer) -> None:
        self.tools, self._directory, self._api = tools, directory, api

    def __call__(self, undo: ExitStack, config: Config, netns: Path) -> Path | None:
        """Have the plugin set up a namespace. Raises RuntimeError with its words if it fails."""
        manifest = config.manifest()
        manifest["metadata"]["namespace"] = "default"
        self._api.put(manifest)
        undo.callback(self._api.delete, "default", config.name)
        pod = {"K8S_POD_NAME": config.name, "K8S_POD_NAMESPACE": "default"}
        environment = Attachment(secrets.token_hex(16), netns, pod).environment("ADD", str(PLUGIN.parent))
        settings = {
            "type": "istio-cni",
            "name": "conformance",
            "cniVersion": "1.0.0",
            "cni_agent_run_dir": str(self._directory),
            "native_nftables": self.tools is Tools.NFTABLES,
            "prevResult": {"cniVersion": "1.0.0", "interfaces": [], "ips": []},
        }
        done = subprocess.run(
            [PLUGIN],
            input=json.dumps(settings),
            env=environment | {"PATH": str(self._directory / "bin")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"istio-cni fails with {self.tools}: {done.stdout}{done.stderr}")
        claim(config, netns)
        return None


@contextmanager
def by_istio(tools: Tools) -> Iterator[ByIstio]:
    """Its API server answers meanwhile. Raises LookupError if a program is missing."""
    if not PLUGIN.exists():
        raise LookupError(f"{PLUGIN} is not built; python -m tests.cluster.builder {PLUGIN.name} builds it")
    authority = trustme.CA()  # the plugin tells its token to nobody who does not speak TLS
    with (
        TemporaryDirectory(prefix="sidestep-istio-cni-") as name,
        ApiServer(authority=authority).running() as api,
    ):
        directory = Path(name)
        (directory / "bin").mkdir()
        for called, program in tools.programs().items():
            found = shutil.which(program)
            if not found:
                raise LookupError(f"there is no {program}; install the package iptables or nftables")
            (directory / "bin" / called).symlink_to(found)
        api.kubeconfig(directory / _KUBECONFIG)
        yield ByIstio(tools, directory, api)
