"""Pods without their processes: namespaces, and the plugin run for them as a runtime would."""

import subprocess
import uuid
from pathlib import Path
from typing import Any

from tests.lab.chain import Attachment
from tests.lab.node import NETNS, Node, make_netns

PREVIOUS: dict[str, Any] = {"cniVersion": "1.0.0", "interfaces": [], "ips": [], "dns": {}, "x-unknown": [1, 2.5, None]}


class Sandboxes:
    """Namespaces with an address each, and the shim to enrol them with: what is left of a pod without its processes."""

    def __init__(self, node: Node, count: int) -> None:
        self.node = node
        self.chain = node.chain
        self.plugin = self.chain.conflist["plugins"][-1]
        self.manifest("mesh")
        self.paths = [self._make(number) for number in range(count)]

    def manifest(self, name: str, **annotations: str) -> None:
        """A mesh Pod in the agent's directory."""
        notes = "".join(f"    {key}: '{value}'\n" for key, value in annotations.items())
        (self.node.pods_dir / f"{name}.yaml").write_text(
            f"kind: Pod\nmetadata:\n  name: {name}\n  annotations:\n    sidecar.istio.io/status: '{{}}'\n{notes}"
            "spec:\n  containers:\n  - name: istio-proxy\n    args: [proxy, sidecar]\n"
        )

    def attachment(self, number: int, pod: str = "mesh") -> Attachment:
        """A new container in one of the namespaces."""
        names = {"K8S_POD_NAME": pod, "K8S_POD_NAMESPACE": "default"}
        return Attachment(uuid.uuid4().hex, self.paths[number], names)

    def run(self, command: str, attachment: Attachment, **options: Any) -> Any:
        """The shim, once."""
        previous = PREVIOUS if command in ("ADD", "CHECK") else None
        return self.chain.run(command, {**self.plugin, **options}, attachment, previous)

    def cycle(self, number: int, times: int = 1) -> None:
        """ADD and DEL of a new container, one after the other: a namespace never has two at once."""
        for _ in range(times):
            attachment = self.attachment(number)
            assert self.run("ADD", attachment) == PREVIOUS
            assert self.run("DEL", attachment) is None

    def remove(self) -> None:
        """Take the namespaces down, without a DEL for what is enrolled."""
        for path in self.paths:
            subprocess.run(["ip", "netns", "del", path.name], check=True)

    def _make(self, number: int) -> Path:
        path = NETNS / f"sidestep-{self.node.id}-{number}"
        make_netns(path)
        subprocess.run(["ip", "-n", path.name, "link", "add", "eth0", "type", "bridge"], check=True)
        subprocess.run(["ip", "-n", path.name, "addr", "add", f"10.0.0.{number + 1}/32", "dev", "eth0"], check=True)
        return path
