"""What a cluster is built from: programs of public Go modules, pinned by the go.mod and go.sum of modules/.

Programs whose dependencies exclude each other are in modules of their own. Which packages a module builds stands in the
`tool` lines of its go.mod.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import shape, versions

MODULES = Path(__file__).with_name("modules")


@dataclass(frozen=True)
class Component:
    """One program. `tags` are build tags of `go build`, `variable` is the Go variable that holds its version.

    `has_c` says that a part of it is written in C.
    """

    name: str
    package: str
    folder: Path
    module: str
    tags: str = ""
    variable: str = ""
    has_c: bool = False

    @property
    def version(self) -> str:
        """That of the module that the program is from, as go.mod pins it. Raises LookupError if it does not."""
        pinned = re.search(rf"^(?:require|\t) *{re.escape(self.module)} (v\S+)", self._mod(), re.MULTILINE)
        if not pinned:
            raise LookupError(f"{self.folder / 'go.mod'} requires no {self.module}")
        return pinned[1]

    def command(self) -> list[str]:
        """What of `go` builds it."""
        return ["build"]

    def directory(self) -> Path:
        """Where it is built: the module whose dependencies it gets."""
        return self.folder

    def flags(self) -> list[str]:
        """For this command: a static program without symbols, the same from whatever folder it is built in."""
        linker = "-s -w" + (f" -X {self.variable}={self.version}" if self.variable else "")
        if self.has_c:
            linker += " -linkmode external -extldflags -static"
        return ["-trimpath", f"-tags={self.tags}", f"-ldflags={linker}"]

    def key(self, compiler: str) -> str:
        """A digest of all that makes the program what it is; `compiler` is the version of Go."""
        digest = hashlib.sha256()
        made_by = (compiler, *self.command(), self.package, *self.flags())
        for part in (*made_by, self._mod(), (self.folder / "go.sum").read_text()):
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()

    def _mod(self) -> str:
        return (self.folder / "go.mod").read_text()


def components(modules: Path = MODULES) -> list[Component]:
    """All of them, of the releases that are chosen, in the order in which they are built. Raises UnknownValue."""
    etcd, server = modules / "etcd", "go.etcd.io/etcd/server/v3"
    istio = [
        Component(Path(package).name, f"istio.io/istio/{package}", modules / "istio", "istio.io/istio", _ISTIO_TAGS)
        for package in _ISTIO
    ]
    helm, coredns = "helm.sh/helm/v4", "github.com/coredns/coredns"
    return [
        Component("etcd", server, etcd, server),
        *(_kubernetes(name, modules / versions.KUBERNETES[versions.kubernetes()]) for name in _KUBERNETES),
        *_runtimes(modules),
        *_network(modules),
        *istio,
        Component("helm", f"{helm}/cmd/helm", modules / "helm", helm),
        Component("coredns", coredns, modules / "coredns", coredns),
    ]


def component(name: str) -> Component:
    """The one of that name. Raises LookupError if it is not among those that are chosen."""
    found = [each for each in components() if each.name == name]
    if not found:
        raise LookupError(f"{name} is no program of this cluster")
    return found[0]


_KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
_ISTIO = (
    "pilot/cmd/pilot-discovery",
    "pilot/cmd/pilot-agent",
    "cni/cmd/istio-cni",
    "cni/cmd/install-cni",
    "istioctl/cmd/istioctl",
)
_CONTAINERD = ("containerd", "containerd-shim-runc-v2", "ctr")
_ISTIO_TAGS = "vtprotobuf,disable_pgv"  # as Istio's own builds


def _runtimes(modules: Path) -> list[Component]:
    """None if the distribution's are taken; runc with them, of which containerd 2 can ask for user namespaces."""
    if versions.containerd() == versions.DISTRIBUTION:
        return []
    runc = "github.com/opencontainers/runc"
    tags = "seccomp,osusergo,netgo"
    made = Component("runc", runc, modules / "runc", runc, tags, has_c=True)
    return [*(_containerd(name, modules / "containerd") for name in _CONTAINERD), made]


def _network(modules: Path) -> list[Component]:
    if shape.network() == shape.BRIDGE:
        return []
    if shape.network() == shape.CILIUM:
        cilium, folder = "github.com/cilium/cilium", modules / "cilium"
        return [
            Component("cilium-agent", f"{cilium}/daemon", folder, cilium),
            Component("cilium-cni", f"{cilium}/plugins/cilium-cni", folder, cilium),
        ]
    flannel, plugins = "github.com/flannel-io/flannel", "github.com/containernetworking/plugins"
    variable = "github.com/flannel-io/flannel/pkg/version.Version"
    return [
        Component("flanneld", flannel, modules / "flannel", flannel, variable=variable, has_c=True),
        Component("flannel", f"{plugins}/plugins/meta/flannel", modules / "flannel-plugin", plugins),
    ]


def _containerd(name: str, folder: Path) -> Component:
    module = "github.com/containerd/containerd/v2"
    # snapshotters that the machine's kernel does not have
    tags = "no_btrfs,no_devmapper,no_zfs"
    return Component(name, f"{module}/cmd/{name}", folder, module, tags, variable=f"{module}/version.Version")


def _kubernetes(name: str, folder: Path) -> Component:
    module = "k8s.io/kubernetes"
    # without a version kubectl takes the server for one of another age, and the server says v0.0.0
    variable = "k8s.io/component-base/version.gitVersion"
    return Component(name, f"{module}/cmd/{name}", folder, module, variable=variable)
