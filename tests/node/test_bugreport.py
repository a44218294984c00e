"""`sidestep bugreport` on a node that works, and on one without an agent: nothing is missing without saying why."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.agent.test_cli_endings import ended
from tests.lab.node import REPOSITORY, Node
from tests.node.conftest import Mesh
from tests.node.test_observation import port
from tests.node.test_status import options

SECRET = "eyJhbGciOi"
EVERY = {
    "README.txt",
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
