"""sidestep in the cluster, installed as docs/operations.md says, and what is asked of it by kubectl."""

import json
import shutil
from typing import Any

import yaml

from tests.cluster.cluster import Cluster, is_ready
from tests.cluster.kubernetes_node import KubernetesNode
from tests.lab.node import REPOSITORY
from tests.lab.waiting import wait_until

IMAGE = REPOSITORY / "build" / "image" / "sidestep.tar"
NAMESPACE, DAEMONSET = "istio-system", "istio-cni-node"
SHADOW_DAEMONSET = "sidestep-shadow-node"
IMAGE_NAME = "localhost/sidestep:latest"  # image/build.sh
_SECONDS = 240  # the first start compiles the programs and runs the self-test
# no node has an agent for a while: harder than one node after the other, and half as long
ALL_AT_ONCE: dict[str, Any] = {"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}}}


class Sidestep:
    """The DaemonSet's; another one's if its name is given, but that is installed by a Release only."""

    def __init__(self, cluster: Cluster, daemonset: str = DAEMONSET) -> None:
        self._cluster, self._control, self.daemonset = cluster, cluster.control, daemonset
        self._overlay = cluster.directory / "manifests" / "overlays" / "own"

    def install(self, node: str = "") -> None:
        """By an overlay of its own over the base; its pods are Ready on every node afterwards, or on `node` alone."""
        shutil.copytree(REPOSITORY / "manifests", self._cluster.directory / "manifests")
        self._overlay.mkdir()
        name, _, tag = IMAGE_NAME.rpartition(":")
        images = [{"name": "sidestep", "newName": name, "newTag": tag}]
        own: dict[str, Any] = {
            "resources": ["../../base"],
            "components": ["../../components/namespace"],
            "images": images,
        }
        own["patches"] = [{"patch": json.dumps(_daemonset(ALL_AT_ONCE))}]
        if node:
            own["patches"].append({"patch": json.dumps(_daemonset(_only_on(node)))})
        (self._overlay / "kustomization.yaml").write_text(yaml.safe_dump(own))
        self.apply()

    def apply(self) -> None:
        """The overlay, again; its pods are Ready on every node afterwards."""
        self._control.kubectl("apply", "-k", self._overlay)
        self.wait_until_rolled_out()

    def remove(self) -> None:
        """What the overlay has brought, without the namespace, which is Istio's too; its pods are gone afterwards."""
        printed = yaml.safe_load_all(self._control.kubectl("kustomize", self._overlay))
        brought = yaml.safe_dump_all(each for each in printed if each["kind"] != "Namespace")
        self._control.kubectl("delete", "--ignore-not-found", "-f", "-", text=brought)
        gone = ["--for=delete", "pod", "-l", f"k8s-app={self.daemonset}", f"--timeout={_SECONDS}s"]
        self._control.kubectl("wait", "-n", NAMESPACE, *gone)

    def change(self, command: str, *what: str) -> None:
        """`kubectl set COMMAND`, such as image or env; the DaemonSet's pods have it afterwards."""
        self._control.kubectl("set", command, "-n", NAMESPACE, f"daemonset/{self.daemonset}", *what)
        self.wait_until_rolled_out()

    def spec(self) -> dict[str, Any]:
        """The DaemonSet's, to be put back with `put`."""
        found: dict[str, Any] = self._control.get("daemonset", "-n", NAMESPACE, self.daemonset)["spec"]
        return found

    def put(self, **parts: Any) -> None:
        """Parts of the DaemonSet's spec in the place of those that are there; its pods are so afterwards."""
        patch = [{"op": "replace", "path": f"/spec/{name}", "value": value} for name, value in parts.items()]
        where = ["-n", NAMESPACE, f"daemonset/{self.daemonset}", "--type=json"]
        self._control.kubectl("patch", *where, "-p", json.dumps(patch))
        self.wait_until_rolled_out()

    def wait_until_rolled_out(self) -> None:
        """Each node has a Ready agent of the DaemonSet as it is now. Raises CommandFailed if that takes too long."""
        rollout = ["rollout", "status", f"daemonset/{self.daemonset}", "-n", NAMESPACE, f"--timeout={_SECONDS}s"]
        self._control.kubectl(*rollout)

    def delete(self) -> None:
        """The DaemonSet alone; its pods are gone afterwards."""
        names = [f"pod/{pod['metadata']['name']}" for pod in self.pods()]
        self._control.kubectl("delete", "-n", NAMESPACE, f"daemonset/{self.daemonset}")
        self._control.kubectl("wait", "--for=delete", "-n", NAMESPACE, f"--timeout={_SECONDS}s", *names)

    def uninstall(self, node: str, template: dict[str, Any], *argv: str) -> str:
        """Run `sidestep uninstall` on a node, in a pod with the spec of the agents', `template`; its last phase."""
        name = f"uninstall-{node}"
        container = {**template["containers"][0], "args": ["uninstall", *argv]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            container.pop(probe, None)
        spec = {**template, "nodeName": node, "restartPolicy": "Never", "containers": [container]}
        self._control.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}
        )

        def phase() -> str:
            return str(self._control.get("pod", "-n", NAMESPACE, name)["status"].get("phase"))

        wait_until(lambda: phase() in ("Succeeded", "Failed"), f"{name} to end", _SECONDS)
        ended = phase()
        self._control.kubectl("delete", "pod", "-n", NAMESPACE, name)
        return ended

    def kill(self) -> None:
        """Each agent, with SIGKILL, on its node; Ready again afterwards, in the same pods."""
        before = self._restarts()
        for pod in self.pods():
            self._node(pod["spec"]["nodeName"]).kill_container(_container(pod)["containerID"])

        def back() -> bool:
            now = self._restarts()
            return all(now.get(name, 0) > count for name, count in before.items()) and all(map(is_ready, self.pods()))

        wait_until(back, "the agents to be Ready after they were killed", _SECONDS)

    def addresses(self) -> dict[str, str]:
        """Each agent's by its node."""
        return {pod["spec"]["nodeName"]: pod["status"]["podIP"] for pod in self.pods()}

    def pods(self) -> list[dict[str, Any]]:
        """The agents', as the API server has them."""
        found: list[dict[str, Any]] | None = self._control.get(
            "pods", "-n", NAMESPACE, "-l", f"k8s-app={self.daemonset}"
        )
        return found or []

    def is_ready_on(self, node: str) -> bool:
        """Whether an agent is."""
        return any(pod["spec"].get("nodeName") == node and is_ready(pod) for pod in self.pods())

    def status(self, node: str) -> Any:
        """What `sidestep status` says there, whatever its verdict."""
        return self.told(node, "status")

    def told(self, node: str, command: str) -> Any:
        """What `sidestep COMMAND` says there as JSON, whatever it has found."""
        asked = f'sidestep {command} --output json || [ "$?" -eq 1 ] || [ "$?" -eq 3 ]'
        return json.loads(self._exec(node, "sh", "-c", asked))

    def verdict(self, node: str) -> str:
        """The first line of `sidestep status` there, up to the colon."""
        return str(self.status(node)["verdict"]["headline"]).partition(":")[0]

    def captures(self, node: str, pod: str) -> bool:
        """Whether `sidestep pods` says so of it, by NAMESPACE/NAME."""
        return pod in [each["pod"] for each in self.enrolled(node) if each["state"] == "captured"]

    def enrolled(self, node: str) -> list[Any]:
        """The enrolled pods of a node, as `sidestep pods` has them."""
        return [each for each in self.ask_json(node, "pods") if "steering" in each]

    def ask(self, node: str, *argv: str) -> str:
        """What `sidestep …` prints in the agent's container on that node. Raises CommandFailed."""
        return self._exec(node, "sidestep", *argv)

    def ask_json(self, node: str, *argv: str) -> Any:
        """The same, as JSON."""
        return json.loads(self.ask(node, *argv, "--output", "json"))

    def _exec(self, node: str, *argv: str) -> str:
        pod = next(pod["metadata"]["name"] for pod in self.pods() if pod["spec"].get("nodeName") == node)
        return self._control.kubectl("exec", "-n", NAMESPACE, pod, "-c", "install-cni", "--", *argv)

    def _restarts(self) -> dict[str, int]:
        return {pod["metadata"]["name"]: _container(pod)["restartCount"] for pod in self.pods()}

    def _node(self, name: str) -> KubernetesNode:
        return next(node for node in self._cluster.nodes if node.name == name)


def _daemonset(spec: dict[str, Any]) -> dict[str, Any]:
    """What is changed of its spec."""
    metadata = {"name": DAEMONSET, "namespace": NAMESPACE}
    return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata, "spec": spec}


def _only_on(node: str) -> dict[str, Any]:
    """Its pods run there alone."""
    return {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": node}}}}


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    """The agent's, as kubelet sees it."""
    (found,) = pod["status"]["containerStatuses"]
    return dict(found)
