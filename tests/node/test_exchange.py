"""Pods with real Envoys that Istio's rules capture: `sidestep takeover` and `giveback` under load."""

import subprocess
from collections.abc import Iterator

import pytest
import yaml

from cni.policy.annotations import policy_of
from cni.policy.pod import Pod as ApiPod
from tests.conformance.rules import restore_text
from tests.lab.invocation import sidestep
from tests.lab.node import Node
from tests.lab.pod import APP_TCP_PORT, Pod
from tests.node.conftest import Mesh
from tests.node.sidestep import document
from tests.node.test_resilience import under_load

PODS = ["default/alpha", "default/beta"]


@pytest.fixture
def mesh(node: Node) -> Iterator[Mesh]:
    """Two pods that Istio's plugin has set up, and a plain one; the agent came later."""
    node.agent.terminate()
    node.is_chained = False
    alpha, beta, gamma = node.pod("alpha"), node.pod("beta"), node.pod("gamma", mesh=False)
    for pod in (alpha, beta):
        write_rules(pod)
        running = pod.manifest() | {"status": {"phase": "Running", "podIP": str(pod.ip4)}}
        (node.pods_dir / f"{pod.name}.yaml").write_text(yaml.safe_dump(running))
    node.is_chained = True
    node.agent.start()
    yield Mesh(node, alpha, beta, gamma)


def write_rules(pod: Pod) -> None:
    for version, tool in ((4, "iptables-nft-restore"), (6, "ip6tables-nft-restore")):
        text = restore_text(policy_of(ApiPod.model_validate(pod.manifest())), version)
        subprocess.run(["nsenter", f"--net={pod.netns}", tool], input=text, text=True, check=True)


def exchange(node: Node, command: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    """`sidestep takeover` or `giveback` on this lab's node."""
    done = sidestep(command, "--cni-agent-run-dir", node.run_dir, "--pods", node.pods_dir, *argv)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def states(node: Node) -> dict[str, str]:
    return {each["pod"]: each["state"] for each in document(node, "pods")}


def test_pods_go_to_sidestep_and_back_under_load_and_no_request_fails(mesh: Mesh) -> None:
    node = mesh.node
    assert states(node) == dict.fromkeys(PODS, "Istio's rules")

    def take_over() -> int:
        done = exchange(node, "takeover", "--all")
        assert done.stdout.splitlines() == [f"{pod}: captured by sidestep; Istio's rules are removed" for pod in PODS]
        return 0

    def restart() -> int:
        node.agent.terminate()
        node.agent.start()
        assert mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT).pod == "beta"
        return 1

    def give_back() -> int:
        done = exchange(node, "giveback", "--all")
        told = "captured by Istio's rules; sidestep captures it no more"
        assert done.stdout.splitlines() == [f"{pod}: {told}" for pod in PODS]
        return 0

    under_load(mesh, take_over)
    assert states(node) == dict.fromkeys(PODS, "captured")
    under_load(mesh, restart)
    again = exchange(node, "takeover", "alpha")
    assert again.stdout == "default/alpha: captured by sidestep already, without rules of Istio's\n"
    under_load(mesh, give_back)
    assert states(node) == dict.fromkeys(PODS, "Istio's rules")
    assert node.policies()["pods"] == 0
    for ip in mesh.beta.ips:
        for pod in (mesh.alpha, mesh.beta):
            pod.envoy.connections()
        assert mesh.alpha.curl(ip).pod == "beta"
        assert mesh.alpha.envoy.next_connection().listener == "outbound"
        assert mesh.beta.envoy.next_connection().listener == "inbound"
    assert "no pods to exchange" in exchange(node, "giveback", "--all").stdout


def test_what_cannot_be_exchanged_is_named_with_the_reason(mesh: Mesh) -> None:
    node = mesh.node
    for argv, words in (
        (("giveback", "alpha"), "1 of 1 pods not exchanged: default/alpha: it was not taken over"),
        (("takeover", "gamma"), "default/gamma: it is none of sidestep's: "),
        (("takeover", "a/b/c"), "'a/b/c' is no pod's name; give NAME or NAMESPACE/NAME"),
        (("takeover", f"x/{'a' * 300}"), "is no pod's name; give NAME or NAMESPACE/NAME"),
        (("takeover", "nobody"), "no pod on this node is called nobody; give NAMESPACE/NAME"),
        (("takeover", "shop/nobody"), "no Pod shop/nobody"),
    ):
        done = exchange(node, *argv)
        assert done.returncode == 1, argv
        assert words in done.stderr, argv
    assert exchange(node, "takeover").returncode == 2
    node.agent.terminate()
    done = exchange(node, "takeover", "alpha")
    assert "default/alpha: no agent answers at " in done.stderr
    done = exchange(node, "giveback", "--all")
    assert "which pods were taken over is not known" in done.stderr
