"""Pods made through CRI, as kubelet does."""

import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from cri_api.v1 import api_pb2 as cri

from tests.lab import images
from tests.lab.cgroups import remove_cgroup
from tests.lab.containerd import SECONDS, Containerd
from tests.lab.envoy import PROXY_ID, Envoy, bootstrap
from tests.lab.istiod.identities import mesh_authority
from tests.lab.node import NODE_NAME
from tests.lab.waiting import wait_until

APP_PORT = 8080
# What the application answers slowly: it begins, and ends when it is told to.
_SLOW = """#!/bin/sh
echo
echo begin
while [ ! -e {directory}/release ]; do sleep 0.05; done
echo end
"""


class Refused(Exception):
    """The runtime did not make the pod."""


@dataclass
class CriPod:
    """A pod made through CRI: an application, and for a mesh pod its Envoy."""

    runtime: Containerd
    name: str
    mesh: bool = True
    annotations: Mapping[str, str] = field(default_factory=dict)
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    sandbox: str = ""
    ips: tuple[str, ...] = ()
    containers: dict[str, str] = field(default_factory=dict)

    @cached_property
    def envoy(self) -> Envoy:
        """Its log, which is the same file inside and outside."""
        return Envoy(self.directory, Path("/never"), Path("/never"))

    @property
    def ip(self) -> str:
        """The first of its addresses."""
        return self.ips[0]

    @property
    def directory(self) -> Path:
        """Mounted into its containers under the same name."""
        return self.runtime.node.directory / f"pod-{self.uid}"

    def create(self) -> None:
        """As kubelet does: cgroup, sandbox, containers. Raises Refused when the runtime makes no sandbox."""
        self.create_sandbox()
        self.start_app()
        if self.mesh:
            self.start_envoy()
        self._publish("Running")

    def create_sandbox(self) -> None:
        """The first part of it."""
        (self.runtime.node.kubepods / self.uid).mkdir()
        self._publish()
        try:
            made = self.runtime.stub.RunPodSandbox(cri.RunPodSandboxRequest(config=self._config()), timeout=SECONDS)
        except grpc.RpcError as error:
            raise Refused(error.details()) from error
        self.sandbox = made.pod_sandbox_id
        network = self._sandbox_status().status.network
        self.ips = (network.ip, *(each.ip for each in network.additional_ips))

    def start_app(self) -> None:
        """The application: `name` is answered at once, `cgi-bin/slow` when it is released."""
        self.directory.mkdir(mode=0o777)
        self.directory.chmod(0o777)
        (self.directory / "name").write_text(f"{self.name}\n")
        slow = self.directory / "cgi-bin" / "slow"
        slow.parent.mkdir()
        slow.write_text(_SLOW.format(directory=self.directory))
        slow.chmod(0o755)
        self._start("app", ["/bin/httpd", "-f", "-p", str(APP_PORT), "-h", str(self.directory)], 1000)

    @property
    def netns(self) -> Path:
        """Its network namespace, by one of its processes."""
        pid = json.loads(self._sandbox_status().info["info"])["pid"]
        return Path(f"/proc/{pid}/ns/net")

    def _sandbox_status(self) -> Any:
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=self.sandbox, verbose=True)
        return self.runtime.stub.PodSandboxStatus(request, timeout=SECONDS)

    def get(self, ip: str, path: str = "name", seconds: int = 5) -> str:
        """One HTTP request from inside the application's container; what it printed, empty when it failed."""
        command = ["/bin/timeout", str(seconds), "/bin/wget", "-q", "-O", "-", _url(ip, path)]
        return self._exec(command, seconds + 5)

    @contextmanager
    def downloading(self, other: "CriPod") -> Iterator[Path]:
        """One connection from inside the container to the other's that stays open meanwhile.

        Gives the file of what has come. It is complete afterwards, or the connection broke and TimeoutError is raised.
        """
        got, ended = self.directory / f"from-{other.name}", self.directory / f"from-{other.name}.ended"
        fetch = f"wget -q -O {got} {_url(other.ip, 'cgi-bin/slow')}; echo $? > {ended}"
        # the shell ends at once: its own connection to the runtime must not be the one that is tried
        self._exec(["/bin/sh", "-c", f"({fetch}) < /dev/null > /dev/null 2>&1 &"], SECONDS)
        try:
            wait_until(lambda: got.exists() and got.read_text() == "begin\n", "the download to begin", SECONDS)
            yield got
        finally:
            (other.directory / "release").touch()
        wait_until(lambda: ended.exists() and ended.read_text() == "0\n", f"the whole of {got}", SECONDS)
        (other.directory / "release").unlink()

    def remove(self) -> None:
        """As kubelet does."""
        if self.sandbox:
            stub, one = self.runtime.stub, self.sandbox
            try:
                stub.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=one), timeout=SECONDS)
                stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=one), timeout=SECONDS)
            except grpc.RpcError as error:  # a runtime that has crashed may have forgotten it
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
        self._forget()

    def _forget(self) -> None:
        api = self.runtime.node.api
        if api and ("default", self.name) in api.pods:
            api.delete("default", self.name)
        remove_cgroup(self.runtime.node.kubepods / self.uid)

    def _exec(self, command: Sequence[str], seconds: int) -> str:
        request = cri.ExecSyncRequest(container_id=self.containers["app"], cmd=command, timeout=seconds)
        return str(self.runtime.stub.ExecSync(request, timeout=SECONDS).stdout.decode().strip())

    def _config(self) -> Any:
        # kubelet's own are always there
        annotations = {"kubernetes.io/config.source": "api", **self._annotations()}
        parent = f"/{self.runtime.node.cgroup.name}/{self.runtime.node.kubepods.name}/{self.uid}"
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=self.name, namespace="default", uid=self.uid),
            hostname=self.name,
            log_directory=str(self.runtime.directory),
            annotations=annotations,
            linux=cri.LinuxPodSandboxConfig(cgroup_parent=parent),
        )

    def _annotations(self) -> dict[str, str]:
        return {**self.annotations, **({"sidecar.istio.io/status": "{}"} if self.mesh else {})}

    def _start(self, name: str, command: Sequence[str], user: int) -> None:
        mount = cri.Mount(container_path=str(self.directory), host_path=str(self.directory))
        context = cri.LinuxContainerSecurityContext(run_as_user=cri.Int64Value(value=user))
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image=images.TOOLS),
            command=command,
            log_path=f"{self.uid}-{name}.log",
            mounts=[mount],
            linux=cri.LinuxContainerConfig(security_context=context),
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=self.sandbox, config=config, sandbox_config=self._config())
        made = self._create(request)
        self.containers[name] = made
        self.runtime.stub.StartContainer(cri.StartContainerRequest(container_id=made), timeout=SECONDS)

    def _create(self, request: Any) -> str:
        """Again, as kubelet does, where a containerd that was killed has forgotten what it wrote on the disk."""
        for _ in range(10):
            try:
                return str(self.runtime.stub.CreateContainer(request, timeout=SECONDS).container_id)
            except grpc.RpcError as error:
                if "failed to rename" not in str(error.details()):
                    raise
        raise AssertionError(f"{self.name}: containerd's snapshots stay in its way")

    def start_envoy(self) -> None:
        """The proxy, listening."""
        config, admin = self.directory / "envoy.json", self.directory / "admin.sock"
        mesh_authority().issue(self.directory, "default", self.name, PROXY_ID)
        config.write_text(json.dumps(bootstrap(self.envoy.log, admin, False, self.directory)))
        argv = ["/bin/envoy", "-c", str(config), "--concurrency", "2", "--file-flush-interval-msec", "10"]
        self._start("istio-proxy", [*argv, "--disable-hot-restart", "--log-level", "warn"], PROXY_ID)
        ask = ["curl", "-s", "--unix-socket", str(admin), "http://envoy/ready"]
        wait_until(
            lambda: subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "LIVE",
            "Envoy to be live",
            SECONDS,
        )

    def manifest(self, phase: str) -> dict[str, Any]:
        """The Pod as the API server has it."""
        containers: list[dict[str, Any]] = [{"name": "app", "image": images.TOOLS}]
        if self.mesh:
            context = {"runAsUser": PROXY_ID, "runAsGroup": PROXY_ID}
            proxy = {"name": "istio-proxy", "args": ["proxy", "sidecar"], "securityContext": context}
            containers.append(proxy | {"env": [{"name": "ISTIO_DUAL_STACK", "value": "true"}]})
        statuses = [{"name": name, "containerID": f"containerd://{each}"} for name, each in self.containers.items()]
        status: dict[str, Any] = {"phase": phase, "containerStatuses": statuses}
        if self.ips:
            status |= {"podIP": self.ip, "podIPs": [{"ip": each} for each in self.ips]}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": "default",
                "uid": self.uid,
                "annotations": self._annotations(),
            },
            "spec": {"nodeName": NODE_NAME, "containers": containers},
            "status": status,
        }

    def _publish(self, phase: str = "Pending") -> None:
        assert self.runtime.node.api is not None
        self.runtime.node.api.put(self.manifest(phase))


def _url(ip: str, path: str) -> str:
    host = f"[{ip}]" if ip_address(ip).version == 6 else ip
    return f"http://{host}:{APP_PORT}/{path}"
