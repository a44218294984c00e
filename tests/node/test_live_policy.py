"""Policies of running pods as their owners meet them: an annotation changes, and new connections go by it, or not."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import yaml

from tests.lab.apiserver import ApiServer
from tests.lab.command import sidestep, sidestep_json
from tests.lab.node import Node
from tests.lab.pod import APP_TCP_PORT, Pod
from tests.lab.waiting import wait_until

TRAFFIC = "traffic.sidecar.istio.io/"
LIVE, UNCAPTURED = "sidestep.io/live-policy", "sidestep.io/uncaptured"
ON, OFF = {LIVE: "true"}, {LIVE: "false"}
SECONDS = 5.0  # a second is promised, on a machine that does nothing else


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer().running() as made:
        yield made


def annotate(pod: Pod, **annotations: str | None) -> None:
    """As `kubectl annotate` does; None removes one."""
    for key, value in annotations.items():
        name = {"live": LIVE, "uncaptured": UNCAPTURED, "mode": "sidecar.istio.io/interceptionMode"}.get(key)
        name = name or f"{TRAFFIC}{key}"
        pod.annotations.pop(name, None)
        pod.annotations |= {name: value} if value is not None else {}
    if pod.node.api:
        pod.publish(phase="Running", podIP=str(pod.ip4))
    else:
        (pod.node.pods_dir / f"{pod.name}.yaml").write_text(yaml.safe_dump(pod.manifest()))


def told(pod: Pod) -> dict[str, Any]:
    """What `sidestep pods NAME` says of a pod, which reads Pods from where the agent does."""
    node = pod.node
    source: tuple[object, ...] = ("--kubeconfig", node.directory / "kubeconfig", "--kubernetes-node-name", "lab")
    source = source if node.api else ("--pods", node.pods_dir)
    found: dict[str, Any] = sidestep_json(node, "pods", pod.name, *source)
    return found


def in_force(pod: Pod, name: str) -> str:
    return str(told(pod)["policy"]["annotations"][f"{TRAFFIC}{name}"])


def way(client: Pod, server: Pod) -> str:
    """How a new connection to the other application goes: captured or direct."""
    before = told(client)["connections"]["outbound"]["captured"]
    reply = client.curl(server.ip4, APP_TCP_PORT)
    assert reply.pod == server.name, reply
    return "captured" if told(client)["connections"]["outbound"]["captured"] > before else "direct"


def reasons(pod: Pod) -> list[str]:
    assert pod.node.api is not None
    return [each["reason"] for each in pod.node.api.events if each["involvedObject"]["name"] == pod.name]


@pytest.mark.parametrize("source", ["directory", "api"])
def test_a_running_pod_follows_its_annotations(source: str) -> None:
    with ExitStack() as stack:
        api = stack.enter_context(ApiServer().running()) if source == "api" else None
        node = stack.enter_context(Node(api=api))
        alpha, beta = node.pod("alpha", annotations=ON), node.pod("beta")
        assert way(alpha, beta) == "captured"
        annotate(alpha, excludeOutboundPorts=str(APP_TCP_PORT))
        wait_until(lambda: way(alpha, beta) == "direct", "the port to be excluded", SECONDS)
        annotate(alpha, excludeOutboundPorts=None, excludeOutboundIPRanges=f"{beta.ip4}/32")
        wait_until(lambda: in_force(alpha, "excludeOutboundIPRanges") == f"{beta.ip4}/32", "the range", SECONDS)
        assert way(alpha, beta) == "direct"
        annotate(alpha, excludeOutboundIPRanges=None, includeOutboundIPRanges="", includeInboundPorts="7")
        wait_until(lambda: in_force(alpha, "includeInboundPorts") == "7", "the inbound ports", SECONDS)
        assert way(alpha, beta) == "direct"
        annotate(alpha, includeOutboundPorts=str(APP_TCP_PORT))
        wait_until(lambda: way(alpha, beta) == "captured", "the port to be included", SECONDS)
        annotate(alpha, includeOutboundPorts=None, includeOutboundIPRanges=None, includeInboundPorts=None)
        wait_until(lambda: in_force(alpha, "includeOutboundIPRanges") == "*", "the defaults", SECONDS)
        assert way(alpha, beta) == "captured"
        assert told(alpha)["differs"]["changes"] == []


def test_other_pods_do_not(node: Node) -> None:
    alpha, beta = node.pod("alpha"), node.pod("beta")
    annotate(beta, excludeOutboundPorts="9", live="true")
    annotate(alpha, excludeOutboundPorts=str(APP_TCP_PORT))
    wait_until(lambda: in_force(beta, "excludeOutboundPorts") == "9", "the pod that begins to follow", SECONDS)
    assert way(alpha, beta) == "captured"
    (change,) = told(alpha)["differs"]["changes"]
    assert change["applies"] == "new pods only"
    annotate(beta, excludeOutboundPorts="10", live="false")
    wait_until(lambda: told(beta)["policy"]["annotations"][LIVE] == "false", "it to follow no more", SECONDS)
    assert in_force(beta, "excludeOutboundPorts") == "9"


def test_the_nodes_word_counts_where_the_pod_says_nothing() -> None:
    node = Node()
    node.agent.options = ["--live-policy"]
    with node:
        alpha, beta = node.pod("alpha"), node.pod("beta", annotations=OFF)
        for pod in (alpha, beta):
            annotate(pod, excludeOutboundPorts=str(APP_TCP_PORT))
        wait_until(lambda: way(alpha, beta) == "direct", "the port to be excluded", SECONDS)
        assert way(beta, alpha) == "captured"
        node.agent.terminate()
        node.agent.start()
        assert (way(alpha, beta), way(beta, alpha)) == ("direct", "captured")


@pytest.mark.claim("If it is one that the running pod follows, the old policy stays in force, whole")
def test_a_refused_value_keeps_the_old_policy_and_is_told(api: ApiServer) -> None:
    with Node(api=api) as node:
        alpha, beta = node.pod("alpha", annotations=ON), node.pod("beta")
        annotate(alpha, excludeOutboundPorts=str(APP_TCP_PORT))
        wait_until(lambda: "LivePolicyChanged" in reasons(alpha), "the Event", SECONDS)
        annotate(alpha, excludeOutboundPorts="80-90", includeInboundPorts="")
        wait_until(lambda: "LivePolicyRefused" in reasons(alpha), "the Event", SECONDS)
        assert (way(alpha, beta), in_force(alpha, "includeInboundPorts")) == ("direct", "*")
        (event,) = (each for each in api.events if each["reason"] == "LivePolicyRefused")
        assert event["type"] == "Warning"
        assert '"80-90" is not a port' in event["message"]
        assert event["message"].endswith("The old policy stays in force")
        reason = told(alpha)["differs"]["reason"]
        assert '"80-90" is not a port' in reason and reason.endswith("this pod keeps its old policy")
        annotate(alpha, excludeOutboundPorts=None)
        wait_until(lambda: in_force(alpha, "includeInboundPorts") == "", "a value that makes sense", SECONDS)
        assert way(alpha, beta) == "captured"


def test_what_the_proxy_has_too_is_not_followed_and_each_change_says_so(node: Node) -> None:
    alpha = node.pod("alpha", annotations=ON, app=False, envoy=False)
    annotate(alpha, mode="TPROXY")
    changes = told(alpha)["differs"]["changes"]
    assert {each["name"]: each["applies"] for each in changes} == {"sidecar.istio.io/interceptionMode": "new pods only"}
    node.agent.kill()  # what is followed is seen as a difference only while nobody follows
    annotate(alpha, excludeOutboundPorts="25")
    changes = told(alpha)["differs"]["changes"]
    assert {each["name"]: each["applies"] for each in changes} == {
        "sidecar.istio.io/interceptionMode": "new pods only",
        f"{TRAFFIC}excludeOutboundPorts": "followed within a second",
    }
    text = sidestep(node, "pods", "alpha", "--pods", node.pods_dir).stdout
    assert f'{TRAFFIC}excludeOutboundPorts: "25", enrolled as "15020" (followed within a second)' in text
    node.agent.start()
    wait_until(lambda: in_force(alpha, "excludeOutboundPorts") == "25", "the new agent", SECONDS)


def test_what_may_go_past_the_proxy_is_followed_too(node: Node) -> None:
    alpha = node.pod("alpha", annotations=ON, app=False, envoy=False)
    sent = """
import json, socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 443))
    print(json.dumps("sent"))
except PermissionError:
    print(json.dumps("refused"))
"""
    assert alpha.python(sent) == "sent"
    annotate(alpha, uncaptured="deny")
    wait_until(lambda: alpha.python(sent) == "refused", "it to be denied", SECONDS)
    annotate(alpha, uncaptured="allow")
    wait_until(lambda: alpha.python(sent) == "sent", "it to be allowed", SECONDS)
