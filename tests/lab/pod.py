"""One pod, made as a runtime makes it: namespace, cgroup, manifest, the CNI chain, then its processes."""

import json
import subprocess
import uuid
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.lab import curl as curls
from tests.lab.chain import Attachment
from tests.lab.envoy import PROXY_ID, Envoy
from tests.lab.inside import PYTHON, popen
from tests.lab.istiod.sent import HTTP, TCP

if TYPE_CHECKING:
    from tests.lab.node import Node

APP_ID = 1000
APP_PORT, APP_TCP_PORT = HTTP, TCP  # of the same application: by these the proxies know which protocol it is
_APP = Path(__file__).with_name("app.py")


class Pod:
    """A pod on a lab node. Addresses are there once create() has returned."""

    def __init__(
        self,
        node: "Node",
        name: str,
        mesh: bool = True,
        annotations: Mapping[str, str] | None = None,
        proxy_env: Mapping[str, str] | None = None,
        app: bool = True,
        envoy: bool = True,
        workers: int = 2,
        cgroup: Path | None = None,
        namespace: str = "default",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.node, self.name, self.mesh, self.namespace = node, name, mesh, namespace
        self.labels = dict(labels or {})
        self._own: set[str] = set()  # annotations that the owner has, or had
        self.annotations, self.proxy_env = dict(annotations or {}), dict(proxy_env or {"ISTIO_DUAL_STACK": "true"})
        self.uid, self.container_id = str(uuid.uuid4()), uuid.uuid4().hex
        self.netns = node.netns.with_name(f"sidestep-{node.id}-{name}")
        self.cgroup = cgroup or node.kubepods / name
        self.cgroup_path = f"/{self.cgroup.relative_to(node.cgroup_root)}"  # what the runtime passes
        self.directory = node.directory / name
        self.tproxy = self.annotations.get("sidecar.istio.io/interceptionMode") == "TPROXY"
        self.envoy = Envoy(self.directory, self.netns, self.cgroup, workers, self.tproxy)
        self._wants_app, self._wants_envoy = app, envoy and mesh
        self.result: dict[str, Any] | None = None
        self.ip4, self.ip6 = IPv4Address(0), IPv6Address(0)
        self._app: subprocess.Popen[str] | None = None

    @property
    def ips(self) -> tuple[IPv4Address, IPv6Address]:
        """Both addresses."""
        return self.ip4, self.ip6

    @property
    def attachment(self) -> Attachment:
        """What the runtime passes to plugins."""
        pod = {"K8S_POD_NAME": self.name, "K8S_POD_NAMESPACE": self.namespace, "K8S_POD_UID": self.uid}
        return Attachment(self.container_id, self.netns, pod, cgroup_path=self.cgroup_path)

    def manifest(self) -> dict[str, Any]:
        """The Pod as the API server would have it after injection."""
        containers: list[dict[str, Any]] = [{"name": "app", "image": "app"}]
        annotations = dict(self.annotations)
        if self.mesh:
            annotations["sidecar.istio.io/status"] = "{}"
            containers.append(
                {
                    "name": "istio-proxy",
                    "image": "auto",
                    "args": ["proxy", "sidecar"],
                    "env": [{"name": key, "value": value} for key, value in self.proxy_env.items()],
                    "securityContext": {"runAsUser": 0 if self.tproxy else PROXY_ID, "runAsGroup": PROXY_ID},
                }
            )
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "uid": self.uid,
                "annotations": annotations,
                **({"labels": self.labels} if self.labels else {}),
            },
            "spec": {"containers": containers},
        }

    def create(self) -> None:
        """Make sandbox and network, then start the processes. Raises CniFailed."""
        from tests.lab.node import make_netns

        self.directory.mkdir()
        self.cgroup.mkdir(parents=True)
        self._manifest_path.write_text(yaml.safe_dump(self.manifest()))
        self.publish()
        make_netns(self.netns)
        self.result = self.node.chain.add(self.attachment)
        addresses = [ip_interface(each["address"]).ip for each in self.result["ips"]]
        self.ip4 = next(ip for ip in addresses if isinstance(ip, IPv4Address))
        self.ip6 = next(ip for ip in addresses if isinstance(ip, IPv6Address))
        if self._wants_app:
            self.start_app()
        if self._wants_envoy:
            self.envoy.start()
        self.publish(phase="Running", podIP=str(self.ip4))

    def publish(self, **status: Any) -> None:
        """Tell the API server, if there is one, of the Pod and its status. Annotations that others have added stay."""
        if self.node.api:
            manifest = self.manifest()
            manifest["spec"]["nodeName"] = "lab"
            known = self.node.api.pods.get((self.namespace, self.name), {}).get("metadata", {})
            if known.get("uid") == self.uid:
                others = {key: value for key, value in known["annotations"].items() if key not in self._own}
                manifest["metadata"]["annotations"] |= others
            self._own |= self.annotations.keys()
            self.node.api.put(manifest | {"status": status})

    def start_app(self) -> None:
        """The HTTP application on both ports and in both families."""
        argv = [*PYTHON, _APP.read_text(), self.name, str(APP_PORT), str(APP_TCP_PORT)]
        with (self.directory / "app.log").open("ab") as log:
            self._app = self.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._app.stdout is not None
        assert self._app.stdout.readline() == "ready\n"

    def popen(self, argv: list[Any], uid: int = APP_ID, gid: int | None = None, **options: Any) -> Any:
        """A process of this pod."""
        return popen(self.netns, self.cgroup, argv, uid, uid if gid is None else gid, **options)

    def python(self, code: str, *args: object, uid: int = APP_ID) -> Any:
        """Run a snippet in the pod and parse the JSON it prints."""
        argv = [*PYTHON, code, *map(str, args)]
        process = self.popen(argv, uid, stdout=subprocess.PIPE, text=True)
        return json.loads(process.communicate(timeout=30)[0])

    def curl(self, ip: object, port: int = APP_PORT, uid: int = APP_ID, options: tuple[str, ...] = ()) -> curls.Reply:
        """One HTTP request from this pod."""
        return curls.curl(self.netns, self.cgroup, f"http://{curls.host(ip)}:{port}/", uid, uid, *options)

    def stop(self) -> None:
        """End the processes and take the network down, as a runtime does."""
        self.envoy.stop()
        if self._app:
            self._app.kill()
            self._app.communicate()
        self.node.chain.delete(self.attachment, self.result)
        subprocess.run(["ip", "netns", "del", self.netns.name], check=True)
        self._manifest_path.unlink()
        if self.node.api:
            self.node.api.delete(self.namespace, self.name)
        self.node.pods.pop(self.name, None)

    @property
    def _manifest_path(self) -> Path:
        return self.node.pods_dir / f"{self.name}.yaml"
