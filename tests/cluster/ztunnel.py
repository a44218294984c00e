"""A double of ztunnel on every node of the cluster: ztunnel itself is built from Rust, which the cluster is not.

Istio's own chart brings it, so that what kubelet, the agent and the kernel see is as it is with ztunnel: labels, names,
mounts, capabilities, probe, rollout. Only the program is another. It takes pods by ZDS and serves them by sockets in
their network namespaces. It has no TLS and hears nothing from istiod: what it tunnels to is written to its node.
"""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

import tests.lab
from tests.cluster.bed import Bed
from tests.cluster.builder import BIN
from tests.cluster.istio_source import manifests
from tests.cluster.load.load import PYTHON
from tests.cluster.mesh import NAMESPACE
from tests.cluster.sidestep import IMAGE_NAME
from tests.lab.waiting import wait_until

NAME = "ztunnel"
_DOUBLE = "double-of-ztunnel"
_DIRECTORY = "/var/run/ztunnel"
_PEERS = f"{_DIRECTORY}/peers-of-the-double"
_MODULES = ("zds_client.py", "zds_process.py", "ztunnel.py")
_SECONDS = 120
_VALUES = {
    "image": IMAGE_NAME,  # it is there, and has a Python
    "imagePullPolicy": "Never",
    "env": {"PYTHONPATH": "/double"},
    "volumes": [{"name": "double", "configMap": {"name": _DOUBLE}}],
    "volumeMounts": [{"name": "double", "mountPath": "/double/tests/lab"}],
    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
}


class Ztunnel:
    """The double on the nodes of one cluster."""

    def __init__(self, bed: Bed) -> None:
        self._bed, self._control = bed, bed.control

    def install(self) -> None:
        """One is Ready on each node afterwards: the agent there has told it of all its pods."""
        self._control.apply(*self._objects())
        self._wait_until_rolled_out()

    def uninstall(self) -> None:
        """They are gone afterwards."""
        whole = {"apiVersion": "v1", "kind": "List", "items": self._objects()}
        self._control.kubectl("delete", "--ignore-not-found", "-f", "-", text=json.dumps(whole))
        self._wait_until_gone(lambda _: True)
        self.tunnel_to([])

    def replace(self) -> None:
        """By a rollout as ztunnel's chart has it: on each node the new one is Ready before the old one ends."""
        before = {pod["metadata"]["name"] for pod in self._pods()}
        self._control.kubectl("rollout", "restart", "-n", NAMESPACE, f"daemonset/{NAME}")
        self._wait_until_rolled_out()
        self._wait_until_gone(lambda pod: pod["metadata"]["name"] in before)

    def kill(self) -> None:
        """Each with SIGKILL; Ready again afterwards, in the same pods."""
        before = self._restarts()
        for node in self._bed.cluster.nodes:
            for pod in self._pods():
                if pod["spec"]["nodeName"] == node.name:
                    node.kill_container(pod["status"]["containerStatuses"][0]["containerID"])
        wait_until(lambda: all(self._restarts()[name] > count for name, count in before.items()), "restarts", _SECONDS)
        self._wait_until_rolled_out()

    def leave(self, node: str) -> None:
        """None is on that node afterwards."""
        others = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [node]}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [others]}]}
        self._set_affinity({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})
        self._wait_until_gone(lambda pod: pod["spec"].get("nodeName") == node)

    def come_back(self) -> None:
        """One is Ready on each node afterwards."""
        self._set_affinity(None)
        self._wait_until_rolled_out()

    def tunnel_to(self, addresses: Collection[str]) -> None:
        """Have these addresses reached by their port 15008. istiod tells ztunnel which; the double is told here."""
        for node in self._bed.cluster.nodes:
            node.host.run(["sh", "-c", f"mkdir -p {_DIRECTORY} && cat > {_PEERS}"], "\n".join(addresses))

    def seen(self) -> list[dict[str, Any]]:
        """What all have told until now, of connections ("who" is which of their ports) and of ZDS ("who" is "zds")."""
        return [told for pod in self._pods() for told in self._told(pod["metadata"]["name"])]

    def seen_before_kill(self) -> list[dict[str, Any]]:
        """The same, of the processes that have been killed last."""
        return [told for pod in self._pods() for told in self._told(pod["metadata"]["name"], "--previous")]

    def _objects(self) -> list[dict[str, Any]]:
        """The chart's, and the double's program."""
        chart = manifests() / "charts" / "ztunnel"
        template: list[str | Path] = [BIN / "helm", "template", NAME, chart, "--namespace", NAMESPACE, "--values", "-"]
        printed = yaml.safe_load_all(self._control.host.run(template, json.dumps(_VALUES)))
        brought = [_with_double(each) if each["kind"] == "DaemonSet" else each for each in printed if each]
        folder = Path(tests.lab.__file__).parent
        programs = {name: (folder / name).read_text() for name in _MODULES}
        metadata = {"name": _DOUBLE, "namespace": NAMESPACE}
        return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": programs}, *brought]

    def _told(self, pod: str, *options: str) -> Iterable[dict[str, Any]]:
        log = self._control.kubectl("logs", "-n", NAMESPACE, pod, *options)
        return (json.loads(line) for line in log.splitlines() if line.startswith("{"))

    def _set_affinity(self, affinity: dict[str, Any] | None) -> None:
        patch = {"spec": {"template": {"spec": {"affinity": affinity}}}}
        where = ["-n", NAMESPACE, f"daemonset/{NAME}", "--type=merge"]
        self._control.kubectl("patch", *where, "-p", json.dumps(patch))

    def _restarts(self) -> dict[str, int]:
        return {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"] for pod in self._pods()}

    def _pods(self) -> list[dict[str, Any]]:
        return self._control.get("pods", "-n", NAMESPACE, "-l", f"app={NAME}") or []

    def _wait_until_rolled_out(self) -> None:
        rollout = ["rollout", "status", f"daemonset/{NAME}", "-n", NAMESPACE, f"--timeout={_SECONDS}s"]
        self._control.kubectl(*rollout)

    def _wait_until_gone(self, which: Callable[[dict[str, Any]], bool]) -> None:
        wait_until(lambda: not any(map(which, self._pods())), f"pods of {NAME} to be gone", _SECONDS)


def _with_double(daemonset: dict[str, Any]) -> dict[str, Any]:
    """The chart's DaemonSet, in whose container the double runs."""
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    container |= {
        "command": [PYTHON, "-m", "tests.lab.zds_process"],
        "args": [f"{_DIRECTORY}/ztunnel.sock", _PEERS],
        "stdin": True,  # the double ends with that
    }
    return daemonset
