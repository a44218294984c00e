"""`sidestep bugreport` on a node that works, and on one without an agent: nothing is missing without saying why."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from contextlib import suppress
from pathlib import Path

from tests.agent.test_cli_endings import ended
from tests.lab.node import REPOSITORY, Node
from tests.node.conftest import Mesh
from tests.node.test_observation import port
from tests.node.test_status import options

SECRET = "eyJhbGciOi"
EVERY = {
    "README.txt",
    "coverage.json",
    "flows.json",
    "shadow.json",
    "log.txt",
    "maps.txt",
    "metrics.txt",
    "migrate.txt",
    "pods.json",
    "pods.txt",
    "probe.txt",
    "readyz.json",
    "refused.txt",
    "report.html",
    "settings.json",
    "status.json",
    "status.txt",
    "version.txt",
}


def bugreport(node: Node, configurations: Path, *more: object) -> dict[str, str]:
    """The files of the archive by name."""
    argv = [*options(node), "--mounted-cni-net-dir", configurations, "--kubernetes-node-name", "lab", *more]
    command = [sys.executable, "-P", "-m", "installer", "bugreport", *map(str, argv)]
    done = subprocess.run(command, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, check=True)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        for each in tar.getmembers():
            content = tar.extractfile(each)
            assert content is not None
            found[each.name.removeprefix("sidestep-bugreport-lab/")] = content.read().decode()
    return found


def configurations(folder: Path) -> Path:
    plugin = {"type": "calico", "policy": {"k8s_auth_token": SECRET}}
    (folder / "10-calico.conflist").write_text(json.dumps({"name": "k8s", "plugins": [plugin]}))
    (folder / "calico-kubeconfig").write_text(f"users:\n- token: {SECRET}\n")
    return folder


def test_all_is_there_and_nothing_secret(mesh: Mesh, tmp_path: Path) -> None:
    health, monitoring = port(mesh.node, "health"), port(mesh.node, "metrics")
    more = ("--health-port", health, "--monitoring-port", monitoring)
    found = bugreport(mesh.node, configurations(tmp_path), *more)
    assert set(found) == EVERY | {"cni/10-calico.conflist", "cni/calico-kubeconfig"}
    assert not [name for name, text in found.items() if text.startswith("not known")]
    assert found["status.txt"].startswith("OK: 2 pods are captured")
    assert json.loads(found["status.json"])["verdict"]["state"] == "ok"
    assert "agent.serving" in found["log.txt"]
    assert "sidestep_" in found["metrics.txt"]
    assert json.loads(found["settings.json"])["SIDESTEP_BPFFS"] == str(mesh.node.bpffs)
    assert "calico" in found["cni/10-calico.conflist"]
    assert not [name for name, text in found.items() if SECRET in text]


def test_what_only_the_agent_knows_says_so_without_it(mesh: Mesh, tmp_path: Path) -> None:
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    ended("lambda: 1 / 0", CNI_AGENT_RUN_DIR=str(nobody))
    (crash,) = nobody.iterdir()
    found = bugreport(mesh.node, configurations(tmp_path), "--cni-agent-run-dir", nobody, "--monitoring-port", 9)
    assert found["log.txt"] == f"not known: {nobody}/cni.sock: nobody is there\n"
    assert found["metrics.txt"].startswith("not known: port 9: ")
    assert "alpha" in found["pods.txt"]
    assert found[crash.name].endswith("ZeroDivisionError: division by zero\n")


class Hanging:
    """Accepts connections on a socket, counts them and answers nothing, like an agent that hangs."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def asked(self) -> int:
        """How many connections there were."""
        return len(self._accepted)

    def _accept(self) -> None:
        with suppress(OSError):  # the test is over
            while True:
                self._accepted.append(self._listener.accept()[0])


def test_an_agent_that_hangs_is_asked_once(mesh: Mesh, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    path = run_dir / "cni.sock"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.create_server(("127.0.0.1", 0)) as health_listener,
        socket.create_server(("127.0.0.1", 0)) as metrics_listener,
    ):
        listener.bind(str(path))
        listener.listen()
        agent, health, metrics = map(Hanging, (listener, health_listener, metrics_listener))
        where = ("--cni-agent-run-dir", run_dir, "--health-port", health.port, "--monitoring-port", metrics.port)
        ports = {"metrics.txt": metrics.port, "readyz.json": health.port}
        found = bugreport(mesh.node, configurations(tmp_path), *where)
        assert (agent.asked, health.asked, metrics.asked) == (1, 0, 0)
    silent = f"{path}: no answer within 3 s"
    assert found["log.txt"] == f"not known: {silent}\n"
    for name, asked in ports.items():
        assert found[name] == f"not known: port {asked}: not asked, as the agent is silent: {silent}\n"
    assert found["refused.txt"] == f"refused pods: not known: {silent}\n"
    assert f"let pass when they were made, so not captured: not known: {silent}\n" in found["pods.txt"]
    assert f"process {os.getpid()} listens at {silent}" in found["status.txt"]
    assert json.loads(found["status.json"])["agent"]["health"]["fault"] == "not asked"
