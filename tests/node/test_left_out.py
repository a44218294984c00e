"""Pods with a sidecar that sidestep does not capture, or that istio-cni captures too: every such pod is named."""

import subprocess
from typing import Any

import pytest
import yaml

from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.node import NODE_NAME, Node, make_netns
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.sidestep import sidestep
from tests.node.test_status import options, status

ISTIO = "*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\nCOMMIT\n"
BY_ITSELF = "the istio-init container sets up capture itself"


def with_istios_rules(pod: Pod) -> None:
    argv = ["nsenter", f"--net={pod.netns}", "iptables-nft-restore", "--wait=10"]
    subprocess.run(argv, input=ISTIO, text=True, check=True)


def running(name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    """A Pod with a sidecar whose containers run."""
    sidecar = {"name": "istio-proxy", "args": ["proxy", "sidecar"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "annotations": {"sidecar.istio.io/status": "{}"}},
        "spec": {"nodeName": NODE_NAME, "containers": [sidecar], **spec},
        "status": {"phase": "Running", "podIP": "192.0.2.1"},
    }


def test_pods_that_set_up_capture_themselves_are_counted_and_named(node: Node) -> None:
    node.pod("alpha", envoy=False)
    own = running("own", initContainers=[{"name": "istio-init"}])
    host = running("host", hostNetwork=True)
    documents = [own, host, running("gateway") | {"spec": {"containers": [{"name": "app"}]}}]
    (node.pods_dir / "own.yaml").write_text(yaml.safe_dump_all(documents))
    on_host = "it uses the node's own network (hostNetwork)"
    left = [{"pod": "default/own", "reason": BY_ITSELF}, {"pod": "default/host", "reason": on_host}]
    assert status(node, "--pods", node.pods_dir)["sidecars"]["left_out"] == left
    said = sidestep(node, "status", *options(node)[2:], "--pods", node.pods_dir).stdout.splitlines()
    at = said.index("other pods with a sidecar: 2 of this node, NOT captured by sidestep")
    assert said[at + 1] == f"  default/own: {BY_ITSELF}"
    assert f"default/own has a sidecar and is not captured: {BY_ITSELF}" in sidestep(node, "pods").stdout
    assert sidestep(node, "pods", "own").stderr == f"sidestep: default/own is not captured: {BY_ITSELF}\n"
    unknown = sidestep(node, "status", *options(node)[2:]).stdout  # without a source of Pods
    assert "other pods with a sidecar: not known: nowhere to get Pods from" in unknown


def test_their_owners_and_the_log_are_told_why() -> None:
    with ApiServer().running() as api:
        node = Node(api=api)
        node.agent.options += ["--exclude-namespaces", "legacy"]
        with node:
            own = api.put(running("own", initContainers=[{"name": "istio-init"}]))
            old = api.put(running("old", namespace="legacy"))
            wait_until(lambda: len(api.events) == 2, "both Events", 30)
            told = {each["involvedObject"]["uid"]: (each["reason"], each["message"]) for each in api.events}
            assert told[own["metadata"]["uid"]] == ("NotCaptured", f"sidestep does not capture this pod: {BY_ITSELF}")
            assert told[old["metadata"]["uid"]][1].endswith("namespace legacy is in exclude_namespaces")
            assert "event=pod.not_captured pod=legacy/old" in node.agent.log.read_text()


def test_a_new_pod_with_the_rules_of_istio_cni_is_refused_by_that_name(node: Node) -> None:
    pod = Pod(node, "alpha")
    for directory in (pod.directory, pod.cgroup):
        directory.mkdir()
    (node.pods_dir / "alpha.yaml").write_text(yaml.safe_dump(pod.manifest()))
    make_netns(pod.netns)
    with_istios_rules(pod)
    with pytest.raises(
        CniFailed, match="istio-cni's netfilter rules are in the pod's network namespace already"
    ) as told:
        node.chain.add(pod.attachment)
    assert told.value.code == 101
    assert node.entries()["pods"] == 0


def test_rules_that_come_after_the_enrolment_are_seen_at_reconciliation(node: Node) -> None:
    node.pod("beta", envoy=False)
    with_istios_rules(node.pod("alpha", envoy=False))
    node.agent.terminate()
    node.agent.start()  # with a round
    assert "event=pod.captured_twice" in node.agent.log.read_text()
    assert status(node, code=1)["sidecars"]["captured_twice"] == ["default/alpha"]
    said = sidestep(node, "status", *options(node)[2:])
    assert "istio-cni: its rules are in pods that sidestep captures, whose connections are LOST: default/alpha" in (
        said.stdout.splitlines()
    )
