"""A containerd of the lab's own."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import grpc
from cri_api.v1 import api_pb2 as cri
from cri_api.v1.api_pb2_grpc import RuntimeServiceStub

from tests.lab import images
from tests.lab.node import PLUGINS, REPOSITORY, Node
from tests.lab.runc import find_runc, write_runc_without_limits
from tests.lab.waiting import wait_until

SECONDS = 30

CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{net}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
      Root = "{directory}/runc-state"
      BinaryName = "{runc}"
"""


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
        runc, wrapped = find_runc(), self.directory / "runc"
        write_runc_without_limits(wrapped, runc)
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
        self._hang_up()
        self._channel = grpc.insecure_channel(f"unix://{self.directory}/containerd.sock")
        wait_until(self._answers, f"containerd to answer; see {self.directory}/log", SECONDS)

    def import_images(self) -> None:
        """Those of the lab."""
        for image in images.make_images(REPOSITORY / "build" / "images"):
            self._import(image)

    def import_image(self, archive: Path) -> None:
        """An OCI archive, under the name that is in it."""
        self._import(archive)

    def logs(self, container: str) -> str:
        """What a container of the DaemonSet has said."""
        path = self.directory / f"{container}.log"
        return path.read_text()[-4000:] if path.exists() else ""

    def _import(self, archive: Path) -> None:
        argv = ["ctr", "-a", f"{self.directory}/containerd.sock", "-n", "k8s.io", "images", "import"]
        subprocess.run([*argv, "--snapshotter", "overlayfs", archive], check=True, capture_output=True)

    def stop(self) -> None:
        """End the daemon; containers go on, as on a real node."""
        self._hang_up()
        self._end("terminate")

    def kill(self) -> None:
        """SIGKILL: as a crash, in the middle of calls."""
        self._end("kill")

    def _end(self, how: str) -> None:
        if self._process:
            getattr(self._process, how)()
            self._process.wait(SECONDS)
            self._process = None

    def _hang_up(self) -> None:
        if self._channel:
            self._channel.close()

    @property
    def stub(self) -> RuntimeServiceStub:
        """The CRI calls."""
        return RuntimeServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def write_conf(self, name: str = "10-lab.conflist") -> Path:
        """The primary plugin's configuration, as its own installer writes it."""
        conf = {**self.node.conflist(), "plugins": self.node.conflist()["plugins"][:2]}
        path = self.net / name
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


def pure_cgroup2() -> list[str]:
    """A command prefix: a mount namespace in which /sys/fs/cgroup is the cgroup2 hierarchy and nothing else."""
    script = 'mount --make-rprivate / && mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]
