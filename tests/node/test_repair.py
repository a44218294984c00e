"""What the running agent does about broken pods that it is to delete or label, and how it tells."""

import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.apiserver import ApiServer
from tests.lab.node import NODE_NAME, Node
from tests.lab.waiting import wait_until
from tests.node.test_readiness import missing
from tests.node.test_status import status

DELETING = ["--no-repair-repair-pods", "--repair-delete-pods"]
LABELLING = ["--no-repair-repair-pods", "--repair-label-pods"]


def broken(name: str, restarts: int) -> dict[str, Any]:
    """A mesh pod that runs without capture, as its validation keeps finding."""
    last = {"terminated": {"exitCode": 126, "reason": "Error"}}
    status = {"name": "istio-validation", "restartCount": restarts, "state": {"waiting": {}}, "lastState": last}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "annotations": {"sidecar.istio.io/status": "{}"}},
        "spec": {"nodeName": NODE_NAME, "containers": [{"name": "istio-proxy", "args": ["proxy", "sidecar"]}]},
        "status": {"phase": "Pending", "podIP": "10.0.0.2", "initContainerStatuses": [status]},
    }


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer().running() as made:
        yield made


@pytest.fixture
def node(api: ApiServer, request: pytest.FixtureRequest) -> Iterator[Node]:
    node = Node(api=api)
    node.agent.options += request.param
    with node:
        yield node


def reasons(api: ApiServer, uid: str) -> list[str]:
    return [event["reason"] for event in api.events if event["involvedObject"]["uid"] == uid]


@pytest.mark.parametrize("node", [DELETING], indirect=True)
def test_a_broken_pod_is_deleted_as_it_was_seen_and_told(node: Node, api: ApiServer) -> None:
    made = api.put(broken("web", 1))
    uid, version = made["metadata"]["uid"], made["metadata"]["resourceVersion"]
    wait_until(lambda: reasons(api, uid) == ["DeleteBrokenPod"], "the Event", 30)
    ((verb, body),) = api.written
    assert (verb, body["preconditions"]) == ("DELETE", {"uid": uid, "resourceVersion": version})
    assert api.pods == {}


@pytest.mark.parametrize("node", [DELETING], indirect=True)
def test_one_that_changes_meanwhile_is_deleted_as_it_is_then(node: Node, api: ApiServer) -> None:
    api.conflicts = 2
    uid = api.put(broken("web", 1))["metadata"]["uid"]
    wait_until(lambda: reasons(api, uid) == ["DeleteBrokenPod"], "the Event", 30)
    versions = [int(body["preconditions"]["resourceVersion"]) for _, body in api.written]
    assert len(versions) == 3
    assert versions == sorted(set(versions))
    assert api.pods == {}


@pytest.mark.parametrize("node", [LABELLING], indirect=True)
def test_a_broken_pod_is_labelled_as_it_was_seen_and_told_once(node: Node, api: ApiServer) -> None:
    uid = str(uuid.uuid4())
    first = broken("web", 1)
    first["metadata"]["uid"] = uid
    version = api.put(first)["metadata"]["resourceVersion"]
    wait_until(lambda: reasons(api, uid) == ["LabelBrokenPod"], "the Event", 30)
    again = broken("web", 2)
    again["metadata"] |= {"uid": uid, "labels": {"cni.istio.io/uninitialized": "true"}}
    api.put(again)
    api.put(broken("another", 1))
    wait_until(lambda: len(api.events) == 2, "the other pod's Event", 30)
    label = {"cni.istio.io/uninitialized": "true"}
    assert api.written[0] == ("PATCH", {"metadata": {"resourceVersion": version, "uid": uid, "labels": label}})
    assert len(api.written) == 2
    assert api.pods["default", "web"]["metadata"]["labels"] == label
    assert reasons(api, uid) == ["LabelBrokenPod"]


@pytest.mark.parametrize("node", [DELETING], indirect=True)
def test_what_the_api_server_forbids_is_in_readiness_and_status_until_it_allows_it(node: Node, api: ApiServer) -> None:
    api.forbidden = {"DELETE"}
    made = broken("web", 1)
    made["metadata"]["uid"] = str(uuid.uuid4())
    api.put(made)
    wait_until(lambda: list(missing(node)) == ["repairs"], "readiness to tell", 30)
    assert re.fullmatch(r"default/web stays broken: .*DELETE is forbidden.*", missing(node)["repairs"])
    (found,) = status(node, code=1)["verdict"]["findings"]
    assert (found["part"], found["what"].partition(": ")[0]) == ("readiness", "repairs")
    assert "allow it in the agent's ClusterRole" in found["advice"]
    log = node.agent.log.read_text()
    assert "event=repair.failed pod=default/web" in log
    assert "event=pod.repaired" not in log
    api.forbidden = set()
    again = broken("web", 2)
    again["metadata"]["uid"] = made["metadata"]["uid"]
    api.put(again)
    wait_until(lambda: missing(node) == {}, "readiness to come back", 30)
    assert api.pods == {}
