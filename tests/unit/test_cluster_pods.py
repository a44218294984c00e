"""The cache of this node's Pods, against an API server that does everything wrong that one can."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cni.errors import Code, PodNotFound
from cni.pod import Pod
from installer.host.uninstall import Deployment
from installer.pods.api import Api
from installer.pods.cluster import ClusterPods
from installer.pods.errors import ApiFailed
from installer.pods.events import ClusterEvents
from installer.settings import Node
from tests.lab.apiserver import ApiServer
from tests.lab.waiting import wait_until

LIST, WATCH = "GET /api/v1/pods", "WATCH /api/v1/pods"


def manifest(name: str, node: str = "here", **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", **metadata},
        "spec": {"nodeName": node, "containers": [{"name": "app"}]},
    }


class World:
    """An API server, and what an agent has of it."""

    def __init__(self, directory: Path, running: ExitStack) -> None:
        self.server = running.enter_context(ApiServer().running())
        self.kubeconfig = directory / "kubeconfig"
        self.server.kubeconfig(self.kubeconfig)
        self.requests: list[tuple[str, int]] = []
        self.api = Api.of(Node(kubeconfig=self.kubeconfig), lambda verb, status: self.requests.append((verb, status)))
        self.pods = ClusterPods(self.api, "here")
        self._running = running

    def start(self) -> None:
        self._running.enter_context(self.pods.running())
        assert self.pods.wait_synced(5)
        wait_until(lambda: self.server.watchers == 1, "the watch", 5)

    def names(self) -> set[str]:
        return {pod.name for pod in self.pods.every() or []}

    def wait_for(self, *names: str, seconds: float = 10) -> None:
        wait_until(lambda: self.names() == set(names), f"exactly {names} in the cache, not {self.names()}", seconds)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as running:
        yield World(tmp_path, running)


def test_pods_of_this_node_come_go_and_change(world: World) -> None:
    world.server.page_limit = 2
    for name in ("a", "b", "c", "d", "e"):
        world.server.put(manifest(name))
    world.server.put(manifest("elsewhere", node="there"))
    assert world.pods.every() is None
    world.start()
    world.wait_for("a", "b", "c", "d", "e")
    world.server.delete("default", "a")
    world.server.put(manifest("f"))
    world.wait_for("b", "c", "d", "e", "f")
    assert world.server.requests[LIST] == 3
    assert world.server.requests[WATCH] == 1


def test_listeners_hear_of_each_change(world: World) -> None:
    heard: list[tuple[str | None, str | None]] = []

    def listen(before: Pod | None, after: Pod | None) -> None:
        heard.append((before.annotations.get("v") if before else None, after.annotations.get("v") if after else None))

    def broken(before: Pod | None, after: Pod | None) -> None:
        raise RuntimeError("a listener's own fault")

    world.pods.subscribe(broken)
    world.pods.subscribe(listen)
    uid = str(uuid.uuid4())
    world.server.put(manifest("a", uid=uid, annotations={"v": "1"}))
    world.start()
    world.server.put(manifest("a", uid=uid, annotations={"v": "2"}))
    world.server.delete("default", "a")
    wait_until(lambda: len(heard) == 3, "three changes", 5)
    assert heard == [(None, "1"), ("1", "2"), ("2", None)]


def test_a_pod_in_the_cache_costs_no_request(world: World) -> None:
    made = [world.server.put(manifest(f"p{number}")) for number in range(50)]
    world.start()
    before = sum(world.server.requests.values())
    for pod in made:
        found = world.pods.find("default", pod["metadata"]["name"], pod["metadata"]["uid"])
        assert found.uid == pod["metadata"]["uid"]
    assert sum(world.server.requests.values()) == before


def test_a_pod_not_yet_in_the_cache_is_asked_for_once(world: World) -> None:
    world.start()
    made = world.server.put(manifest("late", node=""))  # not shown on the watch
    assert world.pods.find("default", "late", made["metadata"]["uid"]).name == "late"
    assert world.server.requests["GET /api/v1/namespaces/default/pods/late"] == 1


def test_a_name_used_again_is_told_apart_by_uid(world: World) -> None:
    old = world.server.put(manifest("web-0", deletionTimestamp="2026-01-01T00:00:00Z"))
    world.start()
    assert world.pods.find("default", "web-0", old["metadata"]["uid"]).uid == old["metadata"]["uid"]
    new = world.server.put(manifest("web-0"))
    assert world.pods.find("default", "web-0", new["metadata"]["uid"]).uid == new["metadata"]["uid"]
    wait_until(lambda: len(world.pods.every() or []) == 1, "the old one to be gone", 5)
    assert world.pods.find("default", "web-0", None).uid == new["metadata"]["uid"]
    with pytest.raises(PodNotFound, match="it has UID"):
        world.pods.find("default", "web-0", old["metadata"]["uid"])


def test_a_pod_that_does_not_exist_may_be_tried_again(world: World) -> None:
    world.start()
    with pytest.raises(PodNotFound, match="the API server does not know it") as caught:
        world.pods.find("default", "never", "u")
    assert caught.value.code == Code.TRY_AGAIN_LATER


def drop_watches(server: ApiServer) -> None:
    server.drop_watches()


def expire(server: ApiServer) -> None:
    server.expire()


def bookmark_then_drop(server: ApiServer) -> None:
    server.bookmark()
    server.drop_watches()


@pytest.mark.parametrize("fault", [drop_watches, expire, bookmark_then_drop])
def test_after_a_broken_watch_the_cache_is_right(world: World, fault: Callable[[ApiServer], None]) -> None:
    world.server.put(manifest("a"))
    world.start()
    for number in range(4):
        fault(world.server)
        world.server.put(manifest(f"n{number}"))
        if number:
            world.server.delete("default", f"n{number - 1}")
        world.wait_for("a", f"n{number}")
    # a list for each expiry, else only the first one; and not a watch more than what broke, with one retry each
    assert world.server.requests[LIST] <= (1 + 4 * 2 if fault is expire else 1)
    assert world.server.requests[WATCH] <= 1 + 4 * 2


def test_a_new_token_is_read_when_the_old_one_is_refused(world: World) -> None:
    world.start()
    world.server.token = "second"
    world.server.drop_watches()
    wait_until(lambda: world.server.refused[401] >= 2, "refusals", 5)
    with pytest.raises(ApiFailed, match="401 Unauthorized"):
        world.api.get_pod("default", "a")
    world.server.kubeconfig(world.kubeconfig)
    world.server.put(manifest("a"))
    world.wait_for("a")


def test_a_service_accounts_token_is_read_for_every_request(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from installer.pods import access

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(world.server.port))
    (tmp_path / "token").write_text("first\n")
    configuration = access.access_of(Node(), tmp_path)()
    assert configuration.host == f"https://127.0.0.1:{world.server.port}"
    settings: Any = configuration.auth_settings()["BearerToken"]
    assert settings["value"] == "Bearer first"
    (tmp_path / "token").write_text("second\n")
    again: Any = configuration.auth_settings()["BearerToken"]
    assert again["value"] == "Bearer second"


def test_a_slow_server_is_waited_for(world: World) -> None:
    world.start()
    made = world.server.put(manifest("slow", node=""))
    world.server.latency = 5.0
    assert world.pods.find("default", "slow", made["metadata"]["uid"]).name == "slow"
    assert world.server.requests["GET /api/v1/namespaces/default/pods/slow"] == 1
    world.server.latency = 0.0


def test_errors_are_not_answered_with_a_storm(world: World) -> None:
    world.start()
    world.server.failing = 500
    world.server.drop_watches()
    with pytest.raises(PodNotFound, match="500 on demand"):
        world.pods.find("default", "a", "u")
    time.sleep(2)
    # find: three; the watch: growing pauses from 0.25 s
    assert world.server.refused[500] <= 3 + 10
    world.server.failing = 0
    world.server.put(manifest("a"))
    world.wait_for("a")


def test_an_outage_leaves_nothing_behind_and_nothing_out(world: World) -> None:
    seconds = float(os.environ.get("OUTAGE_SECONDS", "3"))
    for number in range(20):
        world.server.put(manifest(f"p{number}"))
    world.start()
    threads = threading.active_count()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    world.server.stop()
    began = time.monotonic()
    asked = len(world.requests)
    for number in range(10):
        world.server.delete("default", f"p{number}")
        world.server.put(manifest(f"q{number}"))
    with pytest.raises(PodNotFound, match="cannot be reached") as caught:
        world.pods.find("default", "q1", "u")
    assert caught.value.code == Code.TRY_AGAIN_LATER
    assert world.pods.find("default", "p15", None).name == "p15"
    while time.monotonic() - began < seconds:
        time.sleep(0.1)
    assert len(world.requests) - asked <= 3 + 8 + seconds / 8
    world.server.start()
    world.wait_for(*(f"p{n}" for n in range(10, 20)), *(f"q{n}" for n in range(10)), seconds=35)
    wait_until(lambda: threading.active_count() <= threads, "threads to end", 5)
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2, "descriptors to be closed", 5)


def test_stopping_does_not_wait_for_a_quiet_watch(world: World) -> None:
    world.start()
    began = time.monotonic()
    world._running.close()
    assert time.monotonic() - began < 5


def test_a_pod_is_deleted_or_labelled_only_as_it_was_seen(world: World) -> None:
    uid = str(uuid.uuid4())
    world.server.put(manifest("a", uid=uid))
    seen = world.api.get_pod("default", "a")
    assert seen is not None
    world.server.put(manifest("a", uid=uid, annotations={"changed": "meanwhile"}))
    assert not world.api.delete_pod(seen)
    assert not world.api.label_pod(seen, "k", "v")
    now = world.api.get_pod("default", "a")
    assert now is not None
    assert world.api.label_pod(now, "k", "v")
    labelled = world.api.get_pod("default", "a")
    assert labelled is not None
    assert labelled.labels == {"k": "v"}
    assert not world.api.label_pod(labelled, "k", "other")
    assert world.api.delete_pod(labelled)
    assert not world.api.delete_pod(labelled)
    assert world.api.get_pod("default", "a") is None


def test_a_daemonset_is_gone_when_it_is_being_deleted(world: World) -> None:
    key = ("istio-system", "istio-cni-node")
    assert world.api.daemonset_is_gone(*key)
    world.server.daemonsets[key] = {"metadata": {"name": "istio-cni-node"}}
    assert not world.api.daemonset_is_gone(*key)
    world.server.daemonsets[key] = {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
    assert world.api.daemonset_is_gone(*key)


def test_events_are_counted_rather_than_repeated(world: World) -> None:
    pod = Pod.model_validate(world.server.put(manifest("a")))
    events = ClusterEvents(world.api, "here")
    with events.running():
        for _ in range(3):
            events.warning(pod, "CaptureRefused", "no good")
        events.normal(pod, "CaptureRepaired", "done")
    first, second = world.server.events
    assert (first["count"], first["type"], first["reason"], first["message"]) == (
        3,
        "Warning",
        "CaptureRefused",
        "no good",
    )
    assert first["involvedObject"]["uid"] == pod.uid
    assert (second["count"], second["type"]) == (1, "Normal")


def test_events_never_wait_for_an_api_server_that_is_away(world: World) -> None:
    pod = Pod.model_validate(world.server.put(manifest("a")))
    events = ClusterEvents(world.api, "here")
    world.server.stop()
    began = time.monotonic()
    for number in range(1000):
        events.warning(pod, "CaptureRefused", f"message {number}")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Node(), "KUBERNETES_SERVICE_HOST and _PORT are not set: not in a cluster; give --kubeconfig FILE"),
        (Node(kubeconfig=Path("/never")), "kubeconfig /never: "),
    ],
)
def test_no_way_to_the_api_server_is_said_at_once(settings: Node, said: str) -> None:
    with pytest.raises(ApiFailed, match=said):
        Api.of(settings, lambda verb, status: None)


@pytest.mark.parametrize(
    ("before", "after", "deleted"),
    [
        ({"metadata": {}}, None, True),
        ({"metadata": {}}, {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, True),
        ({"metadata": {}}, {"metadata": {}}, False),
        (None, None, False),  # an agent that runs without one
    ],
)
def test_only_a_daemonset_that_was_there_can_be_deleted(world: World, before: Any, after: Any, deleted: bool) -> None:
    key = ("istio-system", "istio-cni-node")
    for state, look in ((before, True), (after, False)):
        world.server.daemonsets.pop(key, None)
        if state is not None:
            world.server.daemonsets[key] = state
        if look:
            deployment = Deployment(world.api, "istio-system")
            deployment.look()
    assert deployment.is_deleted() is deleted


@pytest.mark.parametrize(("status", "deleted"), [(401, True), (403, True), (500, False), (0, False)])
def test_an_account_that_went_with_its_daemonset_says_so_but_an_outage_says_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, status: int, deleted: bool
) -> None:
    monkeypatch.setattr("installer.host.uninstall._PAUSE", 0.0)
    world.server.daemonsets["istio-system", "istio-cni-node"] = {"metadata": {}}
    deployment = Deployment(world.api, "istio-system")
    deployment.look()
    if status:
        world.server.failing = status
    else:
        world.server.stop()
    assert deployment.is_deleted() is deleted
