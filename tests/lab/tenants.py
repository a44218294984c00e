"""As many pods as a node takes, half of them in the mesh: enrolled, followed, and there to be found by an agent anew.

What is left out is what an agent doesn't look at: applications and proxies. Pods are as large as real ones in the API
server; those of the mesh have a namespace with an address, and a process in it, in a cgroup as kubelet names it.
"""

import subprocess
import uuid
from pathlib import Path
from typing import Any

from tests.lab.chain import Attachment
from tests.lab.inside import popen
from tests.lab.node import NETNS, NODE_NAME, Node
from tests.lab.sandboxes import PREVIOUS

_SANDBOX = "ip link set lo up; ip link add eth0 type bridge; ip addr add {address}/32 dev eth0"


class Tenants:
    """Of a node whose Pods come from an API server. Leaving the node takes them away."""

    def __init__(self, node: Node, count: int) -> None:
        """Make them and enrol the mesh's, by the plugin that a runtime would run."""
        assert node.api is not None
        self._node, self._plugin = node, node.conflist()["plugins"][-1]
        manifests = [manifest(number) for number in range(count)]
        for each in manifests:
            node.api.put(each)
        self.mesh = [each for each in manifests if is_mesh(each)]
        for number, each in enumerate(self.mesh):
            self._add(NETNS / f"sidestep-{node.id}-{number}", each)

    def _add(self, netns: Path, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        cgroup = self._node.kubepods / f"pod{metadata['uid']}"
        cgroup.mkdir()
        subprocess.run(["ip", "netns", "add", netns.name], check=True)
        popen(netns, None, ["sh", "-c", _SANDBOX.format(address=pod["status"]["podIP"])], 0, 0).wait(20)
        popen(netns, cgroup, ["sleep", "infinity"], 1000, 1000, stdin=subprocess.DEVNULL)
        names = {
            "K8S_POD_NAME": metadata["name"],
            "K8S_POD_NAMESPACE": metadata["namespace"],
            "K8S_POD_UID": metadata["uid"],
        }
        attachment = Attachment(uuid.uuid4().hex, netns, names)
        assert self._node.chain.run("ADD", self._plugin, attachment, PREVIOUS) == PREVIOUS


def is_mesh(pod: dict[str, Any]) -> bool:
    """Whether it is one of those that are enrolled."""
    return "sidecar.istio.io/status" in pod["metadata"]["annotations"]


def manifest(number: int) -> dict[str, Any]:
    """A pod with what real ones have, about 15 KiB as JSON; each second one is a mesh pod."""
    env = [{"name": f"VARIABLE_{index}", "value": "x" * 60} for index in range(40)]
    mounts = [{"name": f"volume-{index}", "mountPath": f"/mnt/volume-{index}"} for index in range(12)]
    containers: list[dict[str, Any]] = [{"name": "app", "image": "app:1", "env": env, "volumeMounts": mounts}]
    annotations = {"note": "y" * 500}
    if number % 2 == 0:
        annotations["sidecar.istio.io/status"] = "{}"
        containers.append({"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": env, "volumeMounts": mounts})
    fields: dict[str, Any] = {f"f:key-{index}": {"f:value": {}} for index in range(150)}
    return {
        "metadata": {
            "name": f"pod-{number}",
            "namespace": "default",
            "uid": str(uuid.uuid4()),
            "annotations": annotations,
            "managedFields": [{"manager": "kubelet", "fieldsV1": fields}],
        },
        "spec": {"nodeName": NODE_NAME, "containers": containers},
        "status": {"phase": "Running", "podIP": f"10.200.{number // 250}.{number % 250 + 1}"},
    }


def resident(pid: int, field: str = "VmRSS") -> float:
    """MiB of memory of a process (proc(5), status); VmHWM is the most it has ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
