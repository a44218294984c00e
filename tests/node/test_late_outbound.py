"""Late outbound as a pod's owner meets it: the Pod is deleted, its proxy ends first, the application sends its last."""

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

LATE = {"sidestep.io/late-outbound": "allow"}
SECONDS = 5.0


@pytest.fixture(params=["directory", "api"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node that gets its Pods from a directory, or from an API server."""
    with ExitStack() as stack:
        api = stack.enter_context(ApiServer().running()) if request.param == "api" else None
        yield stack.enter_context(Node(api=api))


def delete(pod: Pod) -> None:
    """As `kubectl delete` does: the Pod stays for its grace period."""
    manifest = pod.manifest()
    manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    if pod.node.api:
        manifest["spec"]["nodeName"] = "lab"
        pod.node.api.put(manifest | {"status": {"phase": "Running", "podIP": str(pod.ip4)}})
    else:
        (pod.node.pods_dir / f"{pod.name}.yaml").write_text(yaml.safe_dump(manifest))


def explained(client: Pod, server: Pod) -> dict[str, Any]:
    """What `explain --try` says of a connection of the application, which it has made too."""
    found: dict[str, Any] = sidestep_json(
        client.node, "explain", client.name, f"{server.ip4}:{APP_TCP_PORT}", "--uid", "1000", "--try"
    )
    assert found["try"]["agrees"], found
    return found


def late(pod: Pod) -> str:
    """What `sidestep pods NAME` says of it."""
    (line,) = (line for line in sidestep(pod.node, "pods", pod.name).stdout.splitlines() if "late outbound " in line)
    return line.strip()


def test_the_last_that_an_application_sends_passes(anywhere: Node) -> None:
    node = anywhere
    alpha, beta = node.pod("alpha", annotations=LATE), node.pod("beta")
    assert explained(alpha, beta)["verdict"] == "captured"
    assert late(alpha).endswith("begins when the Pod is being deleted and its proxy listens on 15001 no more")
    delete(alpha)
    wait_until(lambda: "the Pod is being deleted" in late(alpha).partition("no more:")[2], "the deletion", SECONDS)
    assert explained(alpha, beta)["verdict"] == "captured"
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod == "beta"
    alpha.envoy.stop()
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod == "beta"
    found = explained(alpha, beta)
    assert (found["verdict"], found["rule"]) == ("direct", "late-outbound")
    assert (found["annotation"]["name"], found["annotation"]["value"]) == ("sidestep.io/late-outbound", "allow")
    assert late(alpha).endswith("late outbound goes on: everything passes")
    assert beta.curl(alpha.ip4, APP_TCP_PORT).pod is None  # inbound stays closed
    assert "late-outbound" in sidestep(node, "coverage", "alpha").stdout


def test_a_proxy_that_crashes_in_a_pod_that_goes_on_lets_nothing_pass(node: Node) -> None:
    alpha, beta = node.pod("alpha", annotations=LATE), node.pod("beta")
    alpha.envoy.stop()
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod is None
    assert explained(alpha, beta)["verdict"] == "captured"


def test_pods_that_do_not_ask_are_refused_to_their_end(node: Node) -> None:
    alpha, beta = node.pod("alpha"), node.pod("beta")
    delete(alpha)
    delete(witness := node.pod("gamma", annotations=LATE, app=False, envoy=False))
    wait_until(lambda: "never listened" in late(witness), "the deletion", SECONDS)
    alpha.envoy.stop()
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod is None


def test_another_agent_goes_on_with_it(node: Node) -> None:
    alpha, beta = node.pod("alpha", annotations=LATE), node.pod("beta")
    node.agent.kill()
    delete(alpha)
    alpha.envoy.stop()
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod is None  # nobody has told the kernel of the deletion
    node.agent.start()
    wait_until(lambda: alpha.curl(beta.ip4, APP_TCP_PORT).pod == "beta", "the agent", SECONDS)
    node.agent.kill()
    assert alpha.curl(beta.ip4, APP_TCP_PORT).pod == "beta"
