"""A containerd of the lab's own, and pods made through CRI as kubelet does."""

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from cri_api.v1 import api_pb2 as cri
from cri_api.v1.api_pb2_grpc import RuntimeServiceStub

from tests.lab import images
from tests.lab.envoy import PROXY_ID, Envoy, bootstrap
from tests.lab.node import NODE_NAME, PLUGINS, REPOSITORY, Node
from tests.lab.waiting import wait_until

_SECONDS = 30
APP_PORT = 8080

CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{net}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
      BinaryName = "{runc}"
"""
# This machine's controllers are in the v1 hierarchies, so its cgroup2 has none to limit containers with. Limits are not
# what these tests are about: they are taken out of each container's specification.
RUNC = """#!{python} -ISB
import json, os, sys
if "--bundle" in sys.argv:
    path = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    with open(path) as file:
        spec = json.load(file)
    spec["linux"].pop("resources", None)
    with open(path, "w") as file:
        json.dump(spec, file)
os.execv("{runc}", ["runc", *sys.argv[1:]])
"""


class Refused(Exception):
    """The runtime did not make the pod."""


class Containerd:
    """One node's runtime. Its processes are in the node's cgroup, so that whoever removes the lab ends them."""

    def __init__(self, node: Node, wrapper: Sequence[str] = ()) -> None:
        """`wrapper` is what the daemon is started through, for another view of the machine."""
        self.node, self._wrapper = node, wrapper
        self.directory = node.directory / "containerd"
        self.bin, self.net = node.directory / "cni-bin", node.directory / "cni-net.d"
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def prepare(self) -> None:
        """Directories, configuration, the primary CNI plugins."""
        for directory in (self.directory, self.bin, self.net):
            directory.mkdir()
        for plugin in ("bridge", "host-local", "portmap", "loopback"):
            (self.bin / plugin).write_bytes((PLUGINS / plugin).read_bytes())
            (self.bin / plugin).chmod(0o755)
        runc = Path(shutil.which("runc") or "/usr/sbin/runc")
        wrapped = self.directory / "runc"
        wrapped.write_text(RUNC.format(python=Path(sys.executable).resolve(), runc=runc))
        wrapped.chmod(0o755)
        text = CONFIG.format(
            directory=self.directory,
            pause=images.PAUSE,
            bin=self.bin,
            net=self.net,
            runc=wrapped if self._wrapper else runc,
        )
        (self.directory / "config.toml").write_text(text)

    def start(self) -> None:
        """Run it and wait until it answers; images are there afterwards."""
        argv = [
            "nsenter",
            f"--net={self.node.netns}",
            *self._wrapper,
            "containerd",
            "-c",
            str(self.directory / "config.toml"),
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.node.cgroup / "agent" / "cgroup.procs").write_text(str(self._process.pid))
        self._channel = grpc.insecure_channel(f"unix://{self.directory}/containerd.sock")
        wait_until(self._answers, f"containerd to answer; see {self.directory}/log", _SECONDS)

    def import_images(self) -> None:
        """Those of the lab."""
        for image in images.make_images(REPOSITORY / "build" / "images"):
            argv = ["ctr", "-a", f"{self.directory}/containerd.sock", "-n", "k8s.io", "images", "import"]
            subprocess.run([*argv, "--snapshotter", "native", image], check=True, capture_output=True)

    def stop(self) -> None:
        """End the daemon; containers go on, as on a real node."""
        if self._channel:
            self._channel.close()
        if self._process:
            self._process.terminate()
            self._process.wait(_SECONDS)
            self._process = None

    @property
    def stub(self) -> RuntimeServiceStub:
        """The CRI calls."""
        return RuntimeServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def write_conf(self) -> Path:
        """The primary plugin's configuration, as its own installer writes it."""
        conf = {**self.node.conflist(), "plugins": self.node.conflist()["plugins"][:2]}
        path = self.net / "10-lab.conflist"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(conf))
        fresh.rename(path)
        return path

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError((self.directory / "log").read_text()[-2000:])
        try:
            self.stub.Version(cri.VersionRequest(), timeout=2)
            conditions = self.stub.Status(cri.StatusRequest(), timeout=2).status.conditions
        except grpc.RpcError:
            return False
        return any(condition.type == "RuntimeReady" and condition.status for condition in conditions)


@dataclass
class CriPod:
    """A pod made through CRI: an application, and for a mesh pod its Envoy."""

    runtime: Containerd
    name: str
    mesh: bool = True
    annotations: Mapping[str, str] = field(default_factory=dict)
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    sandbox: str = ""
    ip: str = ""
    containers: dict[str, str] = field(default_factory=dict)

    @property
    def envoy(self) -> Envoy:
        """Its log, which is the same file inside and outside."""
        if not hasattr(self, "_envoy"):
            self._envoy = Envoy(self.directory, Path("/never"), Path("/never"))
        return self._envoy

    @property
    def directory(self) -> Path:
        """Mounted into its containers under the same name."""
        return self.runtime.node.directory / f"pod-{self.uid}"

    def create(self) -> None:
        """As kubelet does: cgroup, sandbox, containers. Raises Refused when the runtime makes no sandbox."""
        node = self.runtime.node
        (node.kubepods / self.uid).mkdir()
        self._publish()
        try:
            made = self.runtime.stub.RunPodSandbox(cri.RunPodSandboxRequest(config=self._config()), timeout=_SECONDS)
        except grpc.RpcError as error:
            raise Refused(error.details()) from error
        self.sandbox = made.pod_sandbox_id
        status = self.runtime.stub.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=self.sandbox))
        self.ip = status.status.network.ip
        self.directory.mkdir(mode=0o777)
        self.directory.chmod(0o777)
        script = f"echo {self.name} > /tmp/name; exec httpd -f -p {APP_PORT} -h /tmp"
        self._start("app", ["/bin/sh", "-c", script], 1000)
        if self.mesh:
            self._start_envoy()
        self._publish("Running")

    def get(self, ip: str, path: str = "name", seconds: int = 5) -> str:
        """One HTTP request from inside the application's container; what it printed, empty when it failed."""
        host = f"[{ip}]" if ip_address(ip).version == 6 else ip
        command = ["/bin/timeout", str(seconds), "/bin/wget", "-q", "-O", "-", f"http://{host}:{APP_PORT}/{path}"]
        request = cri.ExecSyncRequest(container_id=self.containers["app"], cmd=command, timeout=seconds + 5)
        return str(self.runtime.stub.ExecSync(request, timeout=_SECONDS).stdout.decode().strip())

    def remove(self) -> None:
        """As kubelet does."""
        if self.sandbox:
            self.runtime.stub.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=self.sandbox), timeout=_SECONDS)
            self.runtime.stub.RemovePodSandbox(
                cri.RemovePodSandboxRequest(pod_sandbox_id=self.sandbox), timeout=_SECONDS
            )
        api = self.runtime.node.api
        if api and ("default", self.name) in api.pods:
            api.delete("default", self.name)

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
        made = self.runtime.stub.CreateContainer(request, timeout=_SECONDS).container_id
        self.containers[name] = made
        self.runtime.stub.StartContainer(cri.StartContainerRequest(container_id=made), timeout=_SECONDS)

    def _start_envoy(self) -> None:
        config, admin = self.directory / "envoy.json", self.directory / "admin.sock"
        config.write_text(json.dumps(bootstrap(self.envoy.log, admin, False)))
        argv = ["/bin/envoy", "-c", str(config), "--concurrency", "2", "--file-flush-interval-msec", "10"]
        self._start("istio-proxy", [*argv, "--disable-hot-restart", "--log-level", "warn"], PROXY_ID)
        ask = ["curl", "-s", "--unix-socket", str(admin), "http://envoy/ready"]
        wait_until(
            lambda: subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "LIVE",
            "Envoy to be live",
            _SECONDS,
        )

    def _publish(self, phase: str = "Pending") -> None:
        """The Pod as the API server has it."""
        containers: list[dict[str, Any]] = [{"name": "app", "image": images.TOOLS}]
        if self.mesh:
            context = {"runAsUser": PROXY_ID, "runAsGroup": PROXY_ID}
            containers.append({"name": "istio-proxy", "args": ["proxy", "sidecar"], "securityContext": context})
        statuses = [{"name": name, "containerID": f"containerd://{each}"} for name, each in self.containers.items()]
        status: dict[str, Any] = {"phase": phase, "containerStatuses": statuses}
        if self.ip:
            status["podIP"] = self.ip
        assert self.runtime.node.api is not None
        self.runtime.node.api.put(
            {
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
        )


def pure_cgroup2() -> list[str]:
    """A command prefix: a mount namespace in which /sys/fs/cgroup is the cgroup2 hierarchy and nothing else."""
    script = 'mount --make-rprivate / && mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]
