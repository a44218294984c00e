"""The cluster's control plane: etcd, API server, controllers, scheduler and DNS, as processes of one host."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.cluster import shape
from tests.cluster.addresses import API_SERVICE, CONTROL, POD_NETWORKS, SERVICES
from tests.cluster.builder import BIN
from tests.cluster.certificates import Authority
from tests.cluster.host import CommandFailed, Host
from tests.lab.waiting import wait_until

_SECONDS = 240  # on a machine on which much else is going on
_ETCD = "http://127.0.0.1:2379"  # the host's own loopback
_ISSUER = "https://kubernetes.default.svc.cluster.local"
_COREFILE = """.:53 {{
    errors
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
    }}
}}
"""


class ControlPlane:
    """Runs on a host that has been booted."""

    def __init__(self, host: Host, authority: Authority) -> None:
        self.host, self._authority = host, authority
        self.kubeconfig = authority.kubeconfig("admin", group="system:masters")

    def start(self) -> None:
        """All of it; answers afterwards, and every namespace has its service account."""
        self._tokens = self._authority.signing_key()
        self.host.start("etcd", self._etcd())
        self.start_apiserver()
        self.host.start("kube-controller-manager", self._controllers())
        kubeconfig = self._authority.kubeconfig("system:kube-scheduler")
        self.host.start(
            "kube-scheduler", [BIN / "kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false"]
        )
        self.wait("create", "serviceaccount/default", "--namespace=default")
        self.host.start("coredns", self._dns())

    def start_apiserver(self) -> None:
        """Answers afterwards."""
        self.host.start("kube-apiserver", self._apiserver())
        wait_until(self._answers, f"the API server; see {self.host.log('kube-apiserver')}", _SECONDS)

    def kubectl(self, *argv: str | Path, text: str = "") -> str:
        """What kubectl prints; `text` is its input. Raises CommandFailed."""
        return self.host.run([BIN / "kubectl", f"--kubeconfig={self.kubeconfig}", *argv], text)

    def wait(self, condition: str, *objects: str) -> None:
        """Until the objects are there and `condition` holds, as `kubectl wait --for` has it. Raises CommandFailed."""
        both = [f"--for={each}" for each in dict.fromkeys(("create", condition))]
        self.kubectl("wait", *both, f"--timeout={_SECONDS}s", *objects)

    def get(self, *argv: str) -> Any:
        """An object, or the items of a list; None if there is none."""
        printed = self.kubectl("get", "--ignore-not-found", "-o", "json", *argv)
        found = json.loads(printed) if printed else None
        return found["items"] if found and found["kind"] == "List" else found

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or change them."""
        self.kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def make_namespace(self, name: str, labels: Mapping[str, str] = MappingProxyType({})) -> None:
        """If it is not there."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}})

    def _answers(self) -> bool:
        for daemon in ("etcd", "kube-apiserver"):
            self.host.check(daemon)
        try:
            return self.kubectl("get", "--raw", "/readyz") == "ok"
        except CommandFailed:
            return False

    def _etcd(self) -> list[str | Path]:
        # nothing of a cluster needs to outlive the machine
        data = f"--data-dir={self.host.directory / 'etcd'}"
        return [
            BIN / "etcd",
            data,
            "--unsafe-no-fsync",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
        ]

    def _apiserver(self) -> list[str | Path]:
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
        serving = self._authority.issue("kube-apiserver", *names, API_SERVICE, *CONTROL.ips, "127.0.0.1")
        client = self._authority.issue("kube-apiserver-kubelet-client", group="system:masters")
        options = {
            "etcd-servers": _ETCD,
            "advertise-address": CONTROL.ips[0],
            "service-cluster-ip-range": ",".join(map(str, SERVICES)),
            "authorization-mode": "Node,RBAC",
            "enable-admission-plugins": "NodeRestriction",
            "allow-privileged": "true",
            # a webhook's pod is asked itself: the control plane's host has no kube-proxy
            "enable-aggregator-routing": "true",
            "client-ca-file": self._authority.certificate,
            "tls-cert-file": serving.certificate,
            "tls-private-key-file": serving.key,
            "kubelet-certificate-authority": self._authority.certificate,
            "kubelet-client-certificate": client.certificate,
            "kubelet-client-key": client.key,
            "kubelet-preferred-address-types": "InternalIP",
            "service-account-issuer": _ISSUER,
            "service-account-key-file": self._tokens.certificate,
            "service-account-signing-key-file": self._tokens.key,
            "cert-dir": self.host.directory / "apiserver",
        }
        return [BIN / "kube-apiserver", *(f"--{name}={value}" for name, value in options.items())]

    def _controllers(self) -> list[str | Path]:
        kubeconfig = self._authority.kubeconfig("system:kube-controller-manager")
        options = {
            "kubeconfig": kubeconfig,
            "leader-elect": "false",
            "use-service-account-credentials": "true",
            "service-account-private-key-file": self._tokens.key,
            "root-ca-file": self._authority.certificate,
            "service-cluster-ip-range": ",".join(map(str, SERVICES)),
            "cert-dir": self.host.directory / "controllers",
            "flex-volume-plugin-dir": self.host.directory / "volume-plugins",  # the usual place is below /usr
        }
        if shape.network() != shape.BRIDGE:
            networks = ",".join(map(str, POD_NETWORKS))
            options |= {"allocate-node-cidrs": "true", "cluster-cidr": networks}
        return [BIN / "kube-controller-manager", *(f"--{name}={value}" for name, value in options.items())]

    def _dns(self) -> list[str | Path]:
        corefile = self.host.directory / "Corefile"
        corefile.write_text(_COREFILE.format(kubeconfig=self.kubeconfig))
        return [BIN / "coredns", "-conf", corefile]
