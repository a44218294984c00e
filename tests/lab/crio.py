"""Pods made as CRI-O makes them, by what its sources say: CRI-O itself is in no registry that the tests can ask.

What another runtime does otherwise (cri-o/cri-o: server/sandbox_network.go and internal/config/cgmgr; cri-o/ocicni:
pkg/ocicni/ocicni.go):

- CNI_ARGS in one order, and the namespace by its path in /var/run/netns (internal/config/nsmgr).
- cgroupPath is the pod's cgroup as kubelet has named it: a path with the driver cgroupfs, a slice's bare name with
  systemd. Annotations are those that kubelet gave the sandbox.
- After ADD of all plugins comes CHECK of all, with the cached result, if the configuration's cniVersion has CHECK.
- DEL comes with the cached configuration and result, and with the namespace's path even if that is gone.
- The sandbox has a cgroup and no process (drop_infra_ctr). A conmon for each container runs in the node's network
  namespace, and in the pod's cgroup if conmon_cgroup is `pod`, which the driver cgroupfs requires.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.lab.chain import Attachment, Chain
from tests.lab.node import Node
from tests.lab.pod import Pod

ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
_ORDER = ("IgnoreUnknown", "K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID")
_SLICES = Path("kubepods.slice", "kubepods-burstable.slice")


@dataclass(frozen=True)
class CrioAttachment(Attachment):
    """What CRI-O knows of one pod's network."""

    annotations: Mapping[str, str] = field(default_factory=dict)

    def environment(self, command: str, plugin_path: str) -> dict[str, str]:
        """The CNI_* variables of an invocation."""
        environment = super().environment(command, plugin_path)
        args = dict(each.split("=", 1) for each in environment["CNI_ARGS"].split(";"))
        environment["CNI_ARGS"] = ";".join(f"{name}={args[name]}" for name in _ORDER)
        return environment


@dataclass(frozen=True)
class CrioChain(Chain):
    """A conf list that CRI-O runs."""

    def add(self, attachment: Attachment) -> dict[str, Any]:
        """ADD of all plugins and CHECK of all. Raises CniFailed."""
        result = super().add(attachment)
        for plugin in self.conflist["plugins"]:
            self.run("CHECK", plugin, attachment, result)
        return result

    def run(
        self, command: str, plugin: dict[str, Any], attachment: Attachment, result: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """One plugin once, with the annotations too if it asks for them."""
        assert isinstance(attachment, CrioAttachment)
        if plugin.get("capabilities", {}).get(ANNOTATIONS):
            given = {ANNOTATIONS: dict(attachment.annotations), "cgroupPath": attachment.cgroup_path}
            plugin = {**plugin, "runtimeConfig": given}
            attachment = replace(attachment, cgroup_path="")  # it is there already
        return super().run(command, plugin, attachment, result)


class CrioNode(Node):
    """A node with CRI-O's own bridge (contrib/cni/10-crio-bridge.conflist) and the plugin after it."""

    @property
    def chain(self) -> Chain:
        """bridge, sidestep-cni."""
        return CrioChain(**vars(super().chain))

    def conflist(self) -> dict[str, Any]:
        """With the capabilities that the installer writes."""
        conflist = super().conflist()
        bridge, _, own = conflist["plugins"]
        bridge = {key: value for key, value in bridge.items() if key != "isDefaultGateway"}
        bridge |= {"isGateway": True, "ipMasq": True, "hairpinMode": True}
        bridge["ipam"] = {**bridge["ipam"], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
        own = {**own, "capabilities": {ANNOTATIONS: True, "cgroupPath": True}}
        return {**conflist, "plugins": [bridge, own]}


class CrioPod(Pod):
    """A pod with one container; `driver` is who makes its cgroups: cgroupfs or systemd."""

    def __init__(self, node: Node, name: str, driver: str, mesh: bool = True) -> None:
        is_systemd = driver == "systemd"
        tree = node.cgroup / _SLICES if is_systemd else node.kubepods / "burstable"
        parent = tree / (f"kubepods-burstable-pod_{name}.slice" if is_systemd else f"pod_{name}")
        unit = ".scope" if is_systemd else ""
        super().__init__(node, name, mesh, cgroup=parent / f"crio-{name}{unit}")
        self.cgroup_path = parent.name if is_systemd else f"/{parent.relative_to(node.cgroup_root)}"
        self.sandbox, self.conmon = (parent / f"{kind}-{self.container_id}{unit}" for kind in ("crio", "crio-conmon"))
        node.pods[name] = self

    @property
    def attachment(self) -> Attachment:
        """What CRI-O passes to plugins."""
        usual = super().attachment
        assert usual.netns is not None
        annotations = self.manifest()["metadata"]["annotations"]
        known = {**vars(usual), "netns": Path("/var/run/netns", usual.netns.name)}
        return CrioAttachment(**known, annotations=annotations)

    def create(self) -> None:
        """Make sandbox and network, then start the processes. Raises CniFailed."""
        for cgroup in (self.sandbox, self.conmon):
            cgroup.mkdir(parents=True)
        super().create()
        assert not (self.sandbox / "cgroup.procs").read_text()
