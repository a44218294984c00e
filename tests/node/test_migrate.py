"""`sidestep migrate --check` finds what istio-cni has on a node, says what to do, and changes nothing."""

import json
import socket
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent.cni_host import LIST
from tests.lab import invocation
from tests.lab.apiserver import ApiServer
from tests.lab.node import NODE_NAME, Node
from tests.node.test_left_out import running, with_istios_rules

KEY = ("istio-system", "istio-cni-node")
ENTRY = {"type": "istio-cni"}
UID = "5b1c02ef-3a0e-4c39-9d2b-0f6a3f5d7c11"


def check(net: Path, *argv: object, status: int) -> dict[str, dict[str, str]]:
    """The lines by what they are about, also as people see them."""
    given = ("migrate", "--check", "--mounted-cni-net-dir", net, *argv)
    done = invocation.sidestep(*given, "--output", "json")
    assert done.returncode == status, done.stderr or done.stdout
    told = json.loads(done.stdout)
    assert told["ready"] is (status == 0)
    lines = invocation.sidestep(*given).stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [each["what"] for each in told["findings"]]
    return {each["what"]: each for each in told["findings"]}


def conflist(net: Path, *plugins: dict[str, Any]) -> Path:
    net.mkdir(exist_ok=True)
    path = net / "10-a.conflist"
    path.write_text(json.dumps({**LIST, "plugins": [{"type": "bridge"}, *plugins]}))
    return path


def daemonset(image: str, **container: Any) -> dict[str, Any]:
    containers = [{"name": "install-cni", "image": image, **container}]
    return {"metadata": {"name": KEY[1], "uid": "1"}, "spec": {"template": {"spec": {"containers": containers}}}}


def test_pods_with_rules_and_pods_with_istio_init_are_named(node: Node, tmp_path: Path) -> None:
    conf = conflist(tmp_path / "net.d")
    with_istios_rules(node.pod("a", envoy=False, cgroup=node.kubepods / f"pod{UID}"))
    ruled, own = running("ruled"), running("own", initContainers=[{"name": "istio-init"}])
    ruled["metadata"]["uid"] = UID
    (node.pods_dir / "more.yaml").write_text(yaml.safe_dump_all([ruled, own]))
    before = conf.read_bytes()
    found = check(tmp_path / "net.d", "--pods", node.pods_dir, status=1)
    assert "default/ruled" in found["pods with Istio's rules"]["found"]
    assert "kubectl rollout restart" in found["pods with Istio's rules"]["advice"]
    assert found["pods with istio-init"]["found"] == "1: default/own"
    assert "pilot.cni.enabled=true" in found["pods with istio-init"]["advice"]
    assert found["CNI chain"] == {"what": "CNI chain", "found": "no plugin of istio-cni", "advice": ""}
    assert conf.read_bytes() == before


def test_pods_that_istios_agent_holds_in_ambient_mode_are_named_apart(node: Node, tmp_path: Path) -> None:
    conflist(tmp_path / "net.d")
    with_istios_rules(node.pod("a", envoy=False, mesh=False, cgroup=node.kubepods / f"pod{UID}"))
    held = running("held")
    held["metadata"] |= {"uid": UID, "annotations": {"ambient.istio.io/redirection": "enabled"}}
    sidesteps = running("sidesteps")
    sidesteps["metadata"] |= {"uid": str(uuid.uuid4()), "annotations": {"ambient.istio.io/redirection": "enabled"}}
    (node.pods_dir / "more.yaml").write_text(yaml.safe_dump_all([held, sidesteps]))
    found = check(tmp_path / "net.d", "--pods", node.pods_dir, status=1)
    assert found["pods in Istio's ambient mode"]["found"] == "1: default/held"
    assert "create them anew" in found["pods in Istio's ambient mode"]["advice"]
    assert "default/held" not in found["pods with Istio's rules"]["found"]
    blind = check(tmp_path / "net.d", status=1)["pods in Istio's ambient mode"]
    assert blind["found"].startswith("not known: nowhere to get Pods from")


def test_istio_cnis_entry_counts_as_alive_only_while_its_agent_listens(node: Node, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    conflist(tmp_path / "net.d", {**ENTRY, "cni_agent_run_dir": str(run)})
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(run / "log.sock"))
        agent.listen()
        alive = check(tmp_path / "net.d", "--pods", node.pods_dir, status=1)["CNI chain"]
    dead = check(tmp_path / "net.d", "--pods", node.pods_dir, status=1)["CNI chain"]
    assert alive["found"] == "istio-cni's plugin is in 10-a.conflist, and its agent runs"
    assert dead["found"] == "istio-cni's plugin is in 10-a.conflist, but its agent does not run"


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (None, "no istio-cni-node"),
        (daemonset("istio/install-cni:1.32", command=["install-cni"]), "of Istio's chart, with istio/install-cni:1.32"),
        (daemonset("mesh/sidestep:0.1.0", args=["agent"]), "sidestep's own, with mesh/sidestep:0.1.0"),
    ],
)
def test_the_daemonset_is_named_with_its_image(tmp_path: Path, there: dict[str, Any] | None, found: str) -> None:
    conflist(tmp_path / "net.d")
    with ApiServer().running() as api:
        if there:
            api.daemonsets[KEY] = there
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        given = ("--kubeconfig", kubeconfig, "--kubernetes-node-name", NODE_NAME)
        done = invocation.sidestep(
            "migrate", "--check", "--mounted-cni-net-dir", tmp_path / "net.d", *given, seconds=60
        )
        assert f"DaemonSet in istio-system: {found}"[:60] in done.stdout or found in done.stdout
        assert "pods with istio-init: none" in done.stdout
        api.failing = 403
        done = invocation.sidestep(
            "migrate", "--check", "--mounted-cni-net-dir", tmp_path / "net.d", *given, seconds=60
        )
        assert done.returncode == 1
        assert "DaemonSet in istio-system: not known: " in done.stdout
        assert "pods with istio-init: not known: " in done.stdout


def test_what_cannot_be_looked_at_is_not_taken_for_good(tmp_path: Path) -> None:
    found = check(tmp_path / uuid.uuid4().hex, status=1)
    assert found["CNI chain"]["found"].startswith("not known: ")
    assert found["pods with istio-init"]["found"].startswith("not known: nowhere to get Pods from")
