"""A node of the cluster: containerd, kubelet and kube-proxy on a host of its own, and the primary CNI plugins."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.cluster import cilium, flannel, shape, versions
from tests.cluster.addresses import CONTROL
from tests.cluster.builder import BIN
from tests.cluster.certificates import Authority
from tests.cluster.host import CommandFailed, Host
from tests.lab import images
from tests.lab.node import PLUGINS
from tests.lab.runc import find_runc, write_runc_without_limits
from tests.lab.waiting import wait_until

PRIMARY = "10-cluster.conflist"
_SECONDS = 60
_SOCKET = "/run/containerd/containerd.sock"
_CONTAINERD = f"""
version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{images.PAUSE}"
  # without CAP_SYS_RESOURCE runc can't give a container a better score than its own
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{{runc}}"
      SystemdCgroup = {{is_systemd}}
"""


class KubernetesNode:
    """Runs on a host that has been booted."""

    def __init__(self, host: Host, authority: Authority) -> None:
        self.host, self._authority = host, authority
        self.name = host.name
        # nodes start at the same time, and these files are one for all
        self._proxy_kubeconfig = authority.kubeconfig("system:kube-proxy")
        self._network_kubeconfig = authority.kubeconfig("network", group="system:masters")

    def start(self) -> None:
        """All of it, on a new host. No pod starts before the pause image is there."""
        self._install_plugins()
        self.start_daemons()

    def start_daemons(self) -> None:
        """On a host that has been a node before."""
        self.start_containerd()
        self.start_kubelet()
        if shape.network() == shape.CILIUM:  # which has a kube-proxy of its own
            cilium.start(self.host, self._network_kubeconfig)
            return
        self.start_proxy()
        if shape.network() == shape.FLANNEL:
            flannel.start(self.host, self._network_kubeconfig)

    def import_images(self, archives: Sequence[Path]) -> None:
        """Under the names that are in them."""
        for archive in archives:
            self.host.run([*self._runtimes(), "ctr", "-n", "k8s.io", "images", "import", archive])

    def kill_container(self, container: str) -> None:
        """Its first process, with SIGKILL; `container` is the id as a Pod's status has it."""
        name = container.removeprefix("containerd://")
        self.host.run([*self._runtimes(), "ctr", "-n", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", name])

    def cgroups_of(self, container: str) -> list[str]:
        """Of its first process, a line each hierarchy (proc(5)); `container` is its id."""
        tasks = self.host.run([*self._runtimes(), "ctr", "-n", "k8s.io", "tasks", "list"])
        pid = next(line.split()[1] for line in tasks.splitlines() if line.startswith(container))
        return self.host.run(["cat", f"/proc/{pid}/cgroup"]).splitlines()

    def restart(self, daemon: str) -> None:
        """Kill kubelet or containerd with SIGKILL and start it again."""
        start = {"containerd": self.start_containerd, "kubelet": self.start_kubelet}[daemon]
        self.host.kill(daemon)
        start()

    def plugins(self) -> list[str]:
        """Those of the CNI chain, by their types, in their order."""
        primary = cilium.CONFIGURATION if shape.network() == shape.CILIUM else PRIMARY
        conflist = json.loads(self.host.run(["cat", f"/etc/cni/net.d/{primary}"]))
        return [plugin["type"] for plugin in conflist["plugins"]]

    def start_containerd(self) -> None:
        """Answers afterwards."""
        config = self.host.directory / "containerd.toml"
        is_systemd = str(shape.driver() == shape.SYSTEMD).lower()
        config.write_text(_CONTAINERD.format(runc=self._runc(), is_systemd=is_systemd))
        self.host.start("containerd", [*self._runtimes(), "containerd", "--config", config])
        wait_until(self._runtime_answers, f"containerd; see {self.host.log('containerd')}", _SECONDS)

    def start_kubelet(self) -> None:
        """The API server has to be asked when the node is ready."""
        user = f"system:node:{self.name}"
        config = self.host.directory / "kubelet.yaml"
        config.write_text(yaml.safe_dump(self._kubelet()))
        options = {
            "config": config,
            "kubeconfig": self._authority.kubeconfig(user, group="system:nodes"),
            "hostname-override": self.name,
            "node-ip": ",".join(self.host.place.ips),
        }
        self.host.start("kubelet", [BIN / "kubelet", *(f"--{name}={value}" for name, value in options.items())])

    def start_proxy(self) -> None:
        """kube-proxy, with iptables in the host's network namespace."""
        options = {
            "kubeconfig": self._proxy_kubeconfig,
            "hostname-override": self.name,
            "proxy-mode": "iptables",
            "oom-score-adj": 0,
            # these are the machine's to set
            "conntrack-max-per-core": 0,
            "conntrack-min": 0,
            "conntrack-tcp-timeout-established": "0",
            "conntrack-tcp-timeout-close-wait": "0",
        }
        self.host.start("kube-proxy", [BIN / "kube-proxy", *(f"--{name}={value}" for name, value in options.items())])

    def _install_plugins(self) -> None:
        state = self.host.directory / "state"
        for plugin in ("bridge", "host-local", "portmap", "loopback"):
            shutil.copy(PLUGINS / plugin, state / "opt-cni-bin" / plugin)
        if shape.network() == shape.FLANNEL:
            shutil.copy(BIN / flannel.PLUGIN, state / "opt-cni-bin" / flannel.PLUGIN)
        if shape.network() == shape.CILIUM:
            shutil.copy(BIN / cilium.PLUGIN, state / "opt-cni-bin" / cilium.PLUGIN)
            return  # its agent writes the chain
        (state / "etc-cni-net.d" / PRIMARY).write_text(json.dumps(self._conflist()))

    def _conflist(self) -> dict[str, object]:
        if shape.network() == shape.FLANNEL:
            return flannel.conflist()
        ranges = [[{"subnet": subnet}] for subnet in self.host.place.pod_ranges]
        ipam = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": "cluster", "plugins": [bridge, portmap]}

    def _kubelet(self) -> dict[str, object]:
        serving = self._authority.issue(f"kubelet-{self.name}", self.name, *self.host.place.ips)
        little = (
            "memory.available",
            "nodefs.available",
            "nodefs.inodesFree",
            "imagefs.available",
            "imagefs.inodesFree",
        )
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"x509": {"clientCAFile": str(self._authority.certificate)}},
            "tlsCertFile": str(serving.certificate),
            "tlsPrivateKeyFile": str(serving.key),
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [CONTROL.ips[0]],
            "clusterDomain": "cluster.local",
            "resolvConf": "",  # the machine's name servers are out of reach
            "cgroupDriver": shape.driver(),
            "failCgroupV1": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "localStorageCapacityIsolation": False,
            # the disk is the machine's: how full it is says nothing of this node
            "evictionHard": dict.fromkeys(little, "1%"),
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",  # the usual place is below /usr, the machine's
        }

    def _runc(self) -> Path:
        """What containerd starts containers with."""
        runc = find_runc() if versions.containerd() == versions.DISTRIBUTION else BIN / "runc"
        if shape.cgroups() != shape.PURE:
            return runc
        limitless = self.host.directory / "runc"
        write_runc_without_limits(limitless, runc)
        return limitless

    def _runtimes(self) -> list[str]:
        """What a command begins with so that it, and the shim that it looks for, are of the chosen release."""
        return [] if versions.containerd() == versions.DISTRIBUTION else ["env", f"PATH={BIN}:{os.environ['PATH']}"]

    def _runtime_answers(self) -> bool:
        self.host.check("containerd")
        try:
            self.host.run([*self._runtimes(), "ctr", "version"])
        except CommandFailed:
            return False
        return True
