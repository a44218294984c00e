"""Shadow mode with a real agent beside Istio's rules: which pods it watches, what it says, and how it ends."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from bpf.holder import Holder
from bpf.pins import Pins
from cni.policy.annotations import CapturePolicy
from tests.datapath.ruled import flush_rules, load_rules, rule
from tests.lab import command as commands
from tests.lab.apiserver import ApiServer
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.sidestep import document, sidestep
from tests.node.test_status import options, status

RULES = CapturePolicy(dual_stack=True)


@pytest.fixture
def watched() -> Iterator[tuple[Node, Pod, Pod]]:
    """A node whose agent has shadow mode, a pod with Istio's rules, and one outside of the mesh."""
    with ApiServer().running() as api:
        node = Node(api=api)
        node.is_chained = False
        with node:
            node.agent.terminate()
            outside = node.pod("gamma", mesh=False)
            pod = node.pod("alpha")
            load_rules(pod.netns, RULES)
            node.agent.options = ["--shadow"]
            node.agent.start()
            wait_until(lambda: node.entries()["shadow_sums"] == 1, "the pod to be watched", 30)
            yield node, pod, outside


def shadow(node: Node, *argv: object, code: int) -> Any:
    done = commands.sidestep(node, "shadow", *argv, "--output", "json", seconds=60)
    assert done.returncode == code, done.stderr or done.stdout
    return json.loads(done.stdout)


def compared(node: Node, code: int) -> dict[str, Any]:
    wait_until(lambda: not node.entries()["shadows"], "the records to be compared", 20)
    (found,) = shadow(node, code=code)
    return dict(found)


def test_a_pod_with_istios_rules_is_watched_and_a_difference_is_told(watched: tuple[Node, Pod, Pod]) -> None:
    node, pod, outside = watched
    assert "unknown, as nothing was compared yet: default/alpha" in sidestep(node, "shadow").stdout
    assert shadow(node, code=3)[0]["verdict"] == "unknown"
    for _ in range(2):
        assert pod.curl(outside.ip4).status == 200
        assert outside.curl(pod.ip6).status == 200
    found = compared(node, 0)
    assert (found["pod"], found["verdict"], found["different"]) == ("default/alpha", "same", 0)
    assert found["same"] >= 4
    (alpha,) = (each for each in document(node, "pods") if each["name"] == "alpha")
    assert alpha["state"] == "shadow"
    assert "shadow: Istio's rules capture them, and sidestep only compares: default/alpha" in (
        sidestep(node, "status", *options(node)[2:]).stdout
    )

    rule(pod.netns, "-t nat -I ISTIO_OUTPUT -p tcp --dport 8080 -j RETURN")
    assert pod.curl(outside.ip4).status == 200
    found = compared(node, 1)
    (difference,) = found["differences"]
    assert (difference["address"], difference["port"]) == (str(outside.ip4), 8080)
    assert (difference["sidestep"], difference["rule"]) == ("proxy-outbound", "O10")
    assert difference["netfilter"] == "not redirected"
    assert difference["process"]["command"] == "curl"
    assert shadow(node, "alpha", code=1)["differences"] == [difference]
    assert node.api is not None
    (told,) = (each for each in node.api.events if each["reason"] == "ShadowDiffers")
    assert (
        f"{outside.ip4}:8080: sidestep would decide proxy-outbound (O10), netfilter has not redirected"
        in (told["message"])
    )
    with urllib.request.urlopen(f"http://localhost:{node.agent.port('metrics')}/metrics") as answer:
        metrics = answer.read().decode()
    assert 'sidestep_shadow_connections_total{outcome="different"} 1.0' in metrics
    assert "sidestep_shadow_pods 1.0" in metrics


def test_a_watched_pod_whose_rules_vanish_is_a_fault_and_then_captured(watched: tuple[Node, Pod, Pod]) -> None:
    node, pod, outside = watched
    flush_rules(pod.netns)
    wrong = status(node, code=1)
    assert wrong["sidecars"]["captured_by_nobody"] == ["default/alpha"]
    wait_until(lambda: "event=shadow.rules_gone" in node.agent.log.read_text(), "the fault to be told", 60)
    wait_until(lambda: [each["state"] for each in document(node, "pods")] == ["captured"], "its capture", 30)
    assert pod.curl(outside.ip4).status == 200
    assert outside.curl(pod.ip4).status == 200
    assert node.api is not None
    assert any(each["reason"] == "CapturedByNobody" for each in node.api.events)


def test_an_agent_without_shadow_mode_lets_the_pods_go(watched: tuple[Node, Pod, Pod]) -> None:
    node, pod, outside = watched
    assert pod.curl(outside.ip4).status == 200
    wait_until(lambda: shadow_same(node) > 0, "a comparison", 20)
    node.agent.terminate()
    node.agent.start()  # what was compared is still known
    assert shadow_same(node) > 0
    node.agent.terminate()
    node.agent.options = []
    node.agent.start()
    assert "event=shadow.ended pods=1" in node.agent.log.read_text()
    assert node.entries()["pods"] == 0
    assert pod.curl(outside.ip4).status == 200
    assert outside.curl(pod.ip4).status == 200
    assert not shadow(node, code=3)


DAEMONSET = ("istio-system", "sidestep-shadow-node")


WATCH = f"WATCH /apis/apps/v1/namespaces/{DAEMONSET[0]}/daemonsets"


def run_in_daemonset(node: Node) -> ApiServer:
    """The agent, as the chart runs it in shadow mode."""
    api = node.api
    assert api is not None
    api.put_daemonset(*DAEMONSET)
    node.agent.options = ["--shadow", "--daemonset", DAEMONSET[1]]
    restart(node, api)
    return api


def restart(node: Node, api: ApiServer) -> None:
    """The agent; it watches its DaemonSet afterwards."""
    node.agent.terminate()
    before = api.requests[WATCH]
    node.agent.start()
    wait_until(lambda: api.requests[WATCH] > before, "the watch", 30)


def test_with_its_daemonset_goes_everything_of_shadow_mode(watched: tuple[Node, Pod, Pod]) -> None:
    node, pod, outside = watched
    api = run_in_daemonset(node)
    restart(node, api)
    assert "programs detached" not in node.agent.log.read_text()  # it was merely stopped
    api.delete_daemonset(*DAEMONSET)
    node.agent.terminate()
    assert "programs detached" in node.agent.log.read_text()
    assert not (node.bpffs / "sidestep").exists()
    assert pod.curl(outside.ip4).status == 200
    assert outside.curl(pod.ip4).status == 200


def test_pods_that_nobody_else_captures_stay_captured_without_the_daemonset(watched: tuple[Node, Pod, Pod]) -> None:
    node, pod, outside = watched
    captured = node.pod("beta")
    api = run_in_daemonset(node)
    api.delete_daemonset(*DAEMONSET)
    node.agent.terminate()
    assert "1 shadow pods let go" in node.agent.log.read_text()
    assert [each["name"] for each in document(node, "pods", source=False)] == ["beta"]
    captured.envoy.connections()
    assert captured.curl(outside.ip4).status == 200
    assert captured.envoy.next_connection().listener == "outbound"
    assert pod.curl(outside.ip4).status == 200
    assert outside.curl(pod.ip4).status == 200


def test_an_agent_that_ends_leaves_all_to_one_that_has_come_already(watched: tuple[Node, Pod, Pod]) -> None:
    node, *_ = watched
    api = run_in_daemonset(node)
    api.delete_daemonset(*DAEMONSET)
    with ThreadPoolExecutor(1) as pool, ExitStack() as held:
        with api._lock:  # nobody answers the agent, which has let go of the pins already
            ending = pool.submit(node.agent.terminate)
            held.enter_context(Holder(Pins(node.bpffs)).held(30))
        ending.result()
    assert "event=uninstalled.nothing" in node.agent.log.read_text()
    assert node.entries()["pods"] == 1


def shadow_same(node: Node) -> int:
    done = commands.sidestep(node, "shadow", "--output", "json", seconds=60)
    return sum(int(each["same"]) for each in json.loads(done.stdout))
