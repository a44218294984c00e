"""Pods that sidestep does not capture, or that istio-cni captures too: every such pod is named, with the reason."""

import subprocess
import uuid
from dataclasses import replace
from typing import Any

import pytest
import yaml

from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.node import NODE_NAME, Node, make_netns
from tests.lab.pod import Pod
from tests.lab.sandboxes import PREVIOUS, Sandboxes
from tests.lab.waiting import wait_until
from tests.node.sidestep import document, sidestep
from tests.node.test_status import options, status

ISTIO = "*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\nCOMMIT\n"
EXCLUDED = "namespace legacy is in exclude_namespaces"
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
    node.pod("alpha")
    own = running("own", initContainers=[{"name": "istio-init"}])
    host = running("host", hostNetwork=True)
    documents = [own, host, running("gateway") | {"spec": {"containers": [{"name": "app"}]}}]
    (node.pods_dir / "own.yaml").write_text(yaml.safe_dump_all(documents))
    on_host = "it uses the node's own network (hostNetwork)"
    left = [("default/own", "unknown", BY_ITSELF), ("default/host", "left alone", on_host)]
    found = status(node, code=3)["sidecars"]["left_out"]
    assert [(each["pod"], each["state"], each["reason"]) for each in found] == left
    said = sidestep(node, "status", *options(node)[2:]).stdout.splitlines()
    assert f"? pods: unknown whether captured, with a sidecar: default/own: {BY_ITSELF}" in said
    assert f"· pods: left alone: {on_host}: default/host" in said
    assert f"default/own has a sidecar and is not captured: {BY_ITSELF}" in sidestep(node, "pods").stdout
    alone = sidestep(node, "pods", "own").stderr
    assert alone == f"sidestep: default/own is not captured by sidestep (unknown): {BY_ITSELF}\n"
    rows = [line.split()[:3] for line in sidestep(node, "pods").stdout.splitlines() if line.startswith(" default")]
    assert rows[1:] == [["default", "own", "unknown"], ["default", "host", "left"]]
    unknown = sidestep(node, "status", *options(node)[2:4]).stdout  # without a source of Pods
    assert "? pods: other pods with a sidecar: not known: nowhere to get Pods from\n  → give --pods" in unknown


def test_a_pod_under_istios_own_rules_is_a_row_with_that_word_and_no_fault(node: Node) -> None:
    node.is_chained = False
    pod = node.pod("own", annotations={"sidecar.istio.io/inject": "true"}, envoy=False)
    with_istios_rules(pod)
    own = pod.manifest() | {"status": {"phase": "Running", "podIP": str(pod.ip4)}}
    own["spec"]["initContainers"] = [{"name": "istio-init"}]
    (node.pods_dir / "own.yaml").write_text(yaml.safe_dump(own))
    (found,) = [each for each in document(node, "pods") if each["name"] == "own"]
    assert (found["state"], found["reason"]) == ("Istio's rules", BY_ITSELF)
    (row,) = [line.split() for line in sidestep(node, "pods").stdout.splitlines() if line.startswith(" default")]
    assert row == ["default", "own", "Istio's", "rules", "-", "-"]
    (told,) = status(node)["verdict"]["findings"]
    assert (told["state"], told["what"]) == ("note", f"Istio's rules: {BY_ITSELF}: default/own")


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


def test_pods_that_the_plugin_or_the_agent_let_pass_are_named_until_they_end(node: Node) -> None:
    sandboxes = Sandboxes(node, 3)
    (node.pods_dir / "plain.yaml").write_text("kind: Pod\nmetadata: {name: plain}\n")
    legacy, plain, nobodys = (
        replace(sandboxes.attachment(number), pod=pod)
        for number, pod in enumerate(
            ({"K8S_POD_NAME": "old", "K8S_POD_NAMESPACE": "legacy"}, sandboxes.attachment(1, "plain").pod, {})
        )
    )
    for attachment in (legacy, plain, nobodys):
        assert sandboxes.run("ADD", attachment, exclude_namespaces=["legacy"]) == PREVIOUS
    no_proxy = "there is no istio-proxy container"  # what only the agent can see
    wanted = [
        "let pass when they were made, so not captured, since the agent started: 3",
        f"  not a Kubernetes pod: container {nobodys.container_id}",
        f"  {no_proxy}: default/plain",
        f"  {EXCLUDED}: legacy/old",
    ]
    wait_until(lambda: sidestep(node, "pods").stdout.splitlines()[1:] == wanted, "all three in `pods`")
    assert sidestep(node, "pods", "old").stderr == f"sidestep: legacy/old is not captured: {EXCLUDED}\n"
    log = node.agent.log.read_text()
    assert log.count(f'event=pod.skipped pod=legacy/old container={legacy.container_id} reason="{EXCLUDED}"') == 1
    assert log.count("event=pod.skipped pod=default/plain") == 1
    for attachment in (legacy, plain, nobodys):
        assert sandboxes.run("DEL", attachment, exclude_namespaces=["legacy"]) is None
    assert sidestep(node, "pods").stdout == "no pods are enrolled\n"
    node.agent.terminate()
    away = f"{node.run_dir}/cni.sock: nobody is there"
    assert f"let pass when they were made, so not captured: not known: {away}" in sidestep(node, "pods").stdout
    sandboxes.remove()


def test_the_owner_of_a_pod_that_the_plugin_let_pass_is_told_once_if_it_has_a_sidecar() -> None:
    with ApiServer().running() as api:
        node = Node(api=api)
        node.agent.options += ["--exclude-namespaces", "legacy"]
        with node:
            old = running("old", namespace="legacy")
            old["metadata"]["uid"] = uid = str(uuid.uuid4())
            sandboxes = Sandboxes(node, 2)
            names = {"K8S_POD_NAMESPACE": "legacy", "K8S_POD_NAME": "old", "K8S_POD_UID": uid}
            sandboxes.run("ADD", replace(sandboxes.attachment(0), pod=names), exclude_namespaces=["legacy"])
            plain = replace(sandboxes.attachment(1), pod={**names, "K8S_POD_NAME": "plain", "K8S_POD_UID": "1"})
            sandboxes.run("ADD", plain, exclude_namespaces=["legacy"])
            wait_until(lambda: "pod=legacy/plain" in node.agent.log.read_text(), "the second pod in the log")
            api.put(old)
            wait_until(lambda: len(api.events) == 1, "the Event", 30)
            told = api.events[0]
            assert (told["involvedObject"]["uid"], told["reason"], told["count"]) == (uid, "NotCaptured", 1)
            assert told["message"] == f"sidestep does not capture this pod: {EXCLUDED}"
            api.put(running("own", initContainers=[{"name": "istio-init"}]))
            wait_until(lambda: len(api.events) == 2, "the other pod's Event", 30)
            assert (api.events[1]["involvedObject"]["name"], api.events[0]["count"]) == ("own", 1)
            assert node.agent.log.read_text().count("legacy/old") == 1
            sandboxes.remove()


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
    assert "✗ istio-cni: its rules are in pods that sidestep captures as well: default/alpha" in (
        said.stdout.splitlines()
    )
