"""As many pods as a node takes, half of them in the mesh: enrolled, followed, and there to be found by an agent anew.

What is left out is what an agent doesn't look at: applications, and what proxies do. Pods are as large as real ones in
the API server; those of the mesh have a namespace with an address, and a process of the proxy's user that listens where
proxies do, in a cgroup as kubelet names it.
"""

import subprocess
import uuid
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from tests.lab.chain import Attachment
from tests.lab.envoy import PROXY_ID
from tests.lab.inside import PYTHON, popen
from tests.lab.node import NETNS, NODE_NAME, Node
from tests.lab.sandboxes import PREVIOUS

_SANDBOX = "ip link set lo up; ip link add eth0 type bridge; ip addr add {address}/32 dev eth0"
# All the proxies by one interpreter that forks, so that they share its memory; a line has namespace and cgroup of one.
_PROXIES = """
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None)
uid, *ports = map(int, sys.argv[1:])
for line in sys.stdin:
    netns, cgroup = line.split()
    told, tell = os.pipe()
    if os.fork() == 0:
        with open(cgroup + "/cgroup.procs", "w") as procs:
            procs.write("0")
        assert libc.setns(os.open(netns, os.O_RDONLY), 0x40000000) == 0
        os.setgid(uid)
        os.setuid(uid)
        kept = [socket.create_server(("0.0.0.0", port)) for port in ports]
        os.write(tell, b"x")
        signal.pause()
    os.close(tell)
    assert os.read(told, 1) == b"x"
print("ready", flush=True)
signal.pause()
"""


class Tenants:
    """Of a node whose Pods come from an API server. Leaving the node takes them away."""

    def __init__(self, node: Node, count: int) -> None:
        """Make them and enrol the mesh's, by the plugin that a runtime would run."""
        assert node.api is not None
        self._node, self._plugin = node, node.conflist()["plugins"][-1]
        manifests = [manifest(number, node.unbridged[number + 1]) for number in range(count)]
        for each in manifests:
            node.api.put(each)
        self.mesh = [each for each in manifests if is_mesh(each)]
        places = {}
        for number, each in enumerate(self.mesh):
            netns = NETNS / f"sidestep-{node.id}-{number}"
            cgroup = places[netns] = node.kubepods / f"pod{each['metadata']['uid']}"
            cgroup.mkdir()
            self._add(netns, each)
        self._start_proxies(places)

    def _add(self, netns: Path, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        subprocess.run(["ip", "netns", "add", netns.name], check=True)
        popen(netns, None, ["sh", "-c", _SANDBOX.format(address=pod["status"]["podIP"])], 0, 0).wait(20)
        names = {
            "K8S_POD_NAME": metadata["name"],
            "K8S_POD_NAMESPACE": metadata["namespace"],
            "K8S_POD_UID": metadata["uid"],
        }
        attachment = Attachment(uuid.uuid4().hex, netns, names)
        assert self._node.chain.run("ADD", self._plugin, attachment, PREVIOUS) == PREVIOUS

    def _start_proxies(self, places: Mapping[Path, Path]) -> None:
        """Of each namespace one, in its cgroup."""
        argv = [*PYTHON, _PROXIES, str(PROXY_ID), str(INBOUND_PORT), str(OUTBOUND_PORT)]
        outside = self._node.cgroup / "agent"
        proxies = popen(self._node.netns, outside, argv, 0, 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert proxies.stdin is not None and proxies.stdout is not None
        with proxies.stdin as lines:
            lines.writelines(f"{netns} {cgroup}\n" for netns, cgroup in places.items())
        assert proxies.stdout.readline() == "ready\n"


def is_mesh(pod: dict[str, Any]) -> bool:
    """Whether it is one of those that are enrolled."""
    return "sidecar.istio.io/status" in pod["metadata"]["annotations"]


def manifest(number: int, ip: IPv4Address) -> dict[str, Any]:
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
        "status": {"phase": "Running", "podIP": str(ip)},
    }


def resident(pid: int, field: str = "VmRSS") -> float:
    """MiB of memory of a process (proc(5), status); VmHWM is the most it has ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
