"""Cilium on a node: its agent with kube-proxy's replacement, and its CNI plugin as the first of the chain.

Its socket load-balancer is at the root of the node's cgroups and sees the calls that sidestep sees. The operator does
not run: it needs a module that can't be had (sigs.k8s.io/mcs-api/controllers). What it would do is done otherwise: the
kinds of resources are applied from Cilium's module, and the ranges of pods are the controller manager's.
"""

from pathlib import Path

from tests.cluster import shape
from tests.cluster.addresses import POD_NETWORKS
from tests.cluster.builder import BIN, module_directory
from tests.cluster.components import component
from tests.cluster.host import CGROUPS, Host

AGENT, PLUGIN = "cilium-agent", "cilium-cni"
CONFIGURATION = "05-cilium.conflist"  # which the agent writes
_LINKS = "/sys/fs/bpf/cilium/socketlb/links/cgroup"
# Debian's; the agent compiles its programs when it starts, and looks for `clang`
_COMPILER = Path("/usr/lib/llvm-19/bin")
_OPTIONS = {
    "enable-ipv4": "true",
    "enable-ipv6": "true",
    "enable-ipv4-masquerade": "false",
    "enable-ipv6-masquerade": "false",
    "routing-mode": "native",
    "auto-direct-node-routes": "true",
    "ipam": "kubernetes",
    "kube-proxy-replacement": "true",
    "devices": "eth0",
    "identity-allocation-mode": "crd",
    "cni-exclusive": "false",  # else it takes sidestep's plugin out of the chain
    "write-cni-conf-when-ready": f"/etc/cni/net.d/{CONFIGURATION}",
    # what needs programs of other modules
    "enable-l7-proxy": "false",
    "enable-hubble": "false",
    "enable-health-checking": "false",
    "enable-endpoint-health-checking": "false",
}


def load_balancers(host: Host) -> list[str]:
    """The programs that Cilium has attached at the root of the host's cgroups."""
    return host.run(["ls", _LINKS]).split()


def definitions() -> list[Path]:
    """Of the resources that the agent keeps in the API server, in the module."""
    return sorted((_source() / "pkg/k8s/apis/cilium.io/client/crds").glob("*/*.yaml"))


def start(host: Host, kubeconfig: Path) -> None:
    """The agent, with its programs from the module."""
    source = _source()
    library = host.directory / "cilium"
    library.mkdir(exist_ok=True)
    if not (library / "bpf").exists():
        (library / "bpf").symlink_to(source / "bpf")
    options = {
        **_OPTIONS,
        "k8s-kubeconfig-path": kubeconfig,
        "cgroup-root": CGROUPS if shape.cgroups() == shape.PURE else CGROUPS / "unified",
        "lib-dir": library,
        "ipv4-native-routing-cidr": POD_NETWORKS[0],
        "ipv6-native-routing-cidr": POD_NETWORKS[1],
    }
    named = ["env", f"K8S_NODE_NAME={host.name}", f"PATH={_COMPILER}:/usr/sbin:/usr/bin:/sbin:/bin"]
    host.start(AGENT, [*named, BIN / AGENT, *(f"--{name}={value}" for name, value in options.items())])


def _source() -> Path:
    return module_directory(component(AGENT))
