"""Without the API server, while pods come and go: none gets in uncaptured, none is left out or left over."""

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until

SECONDS = float(os.environ.get("OUTAGE_SECONDS", "10"))  # `make nightly`: a minute
LIST, WATCH = "GET /api/v1/pods", "WATCH /api/v1/pods"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with ApiServer().running() as api, Node(api=api) as made:
        yield made


def assert_captured(one: Pod, other: Pod) -> None:
    for pod in (one, other):
        pod.envoy.connections()
    assert one.curl(other.ip4).pod == other.name
    assert one.envoy.next_connection().listener == "outbound"
    assert other.envoy.next_connection().listener == "inbound"


class Waiting:
    """A mesh pod whose sandbox kubelet makes again and again until it is let in."""

    def __init__(self, node: Node, name: str) -> None:
        self.node, self.name = node, name
        self.refusals: list[int | None] = []
        self.pod: Pod | None = None

    def attempt(self) -> bool:
        pod = Pod(self.node, self.name)
        try:
            pod.create()
        except CniFailed as refused:
            self.refusals.append(refused.code)
            self.node.chain.delete(pod.attachment)
            subprocess.run(["ip", "netns", "del", pod.netns.name], check=True)
            pod.cgroup.rmdir()
            pod.directory.rmdir()
            return False
        self.node.pods[self.name] = self.pod = pod
        return True


def test_pods_that_come_and_go_in_an_outage_are_captured_or_refused_and_none_is_left_over(node: Node) -> None:
    assert node.api
    stays, goes = node.pod("stays"), node.pod("goes")
    foretold = Pod(node, "foretold")  # the watch tells of it before, its sandbox is made in the outage
    foretold.publish()
    wait_until(lambda: node.api is not None and node.api.watchers == 1, "the watch", 10)
    time.sleep(1)  # for what was put last to be read
    node.api.requests.clear()

    node.api.stop()
    began = time.monotonic()
    foretold.create()
    node.pods["foretold"] = foretold
    assert_captured(stays, foretold)
    goes.stop()
    node.is_chained = False
    bypassed = node.pod("bypassed")  # by a runtime whose configuration somebody had overwritten
    node.is_chained = True
    waiting = [Waiting(node, "late0"), Waiting(node, "late1")]
    while time.monotonic() - began < SECONDS or len(waiting[-1].refusals) < 2:
        for each in waiting:
            assert not each.attempt()
        assert_captured(stays, foretold)
        time.sleep(2)
    assert {code for each in waiting for code in each.refusals} == {11}  # try again later
    assert node.entries()["pods"] == node.entries()["links"] == 2

    node.api.start()
    for each in waiting:
        wait_until(each.attempt, f"{each.name} to be let in", 60)
    wait_until(lambda: node.entries()["pods"] == 5, "the one that was bypassed to be enrolled", 60)
    for each in waiting:
        assert each.pod
        assert_captured(stays, each.pod)
        assert_captured(each.pod, bypassed)
    # the watch begins anew; a Pod that it has not told of yet is asked for once
    assert node.api.requests[LIST] <= 2
    assert node.api.requests[WATCH] <= 3
    single = [count for request, count in node.api.requests.items() if "/pods/" in request and count]
    assert sum(single) <= 2 * len(waiting)
    for pod in list(node.pods.values()):
        pod.stop()
    wait_until(lambda: node.entries()["pods"] == node.entries()["links"] == 0, "all to be forgotten", 20)
