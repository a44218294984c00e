"""The cache of this node's Pods: what it has, what it asks for, and what that costs."""

import uuid

import pytest

from cni.errors import Code, PodNotFound
from cni.policy.pod import Pod
from tests.lab.cluster import LIST, WATCH, World, manifest
from tests.lab.waiting import wait_until


def test_pods_of_this_node_come_go_and_change(world: World) -> None:
    for name in ("a", "b", "c", "d", "e"):
        world.server.put(manifest(name))
    world.server.put(manifest("elsewhere", node="there"))
    assert world.pods.every() is None
    world.start()
    world.wait_for("a", "b", "c", "d", "e")
    world.server.delete("default", "a")
    world.server.put(manifest("f"))
    world.wait_for("b", "c", "d", "e", "f")
    assert world.server.requests == {LIST: 1, WATCH: 1}


def test_a_long_list_comes_in_pages(world: World) -> None:
    world.server.page_limit = 2
    for name in ("a", "b", "c", "d", "e"):
        world.server.put(manifest(name))
    pods, version = world.api.list_pods("here")
    assert [pod.name for pod in pods] == ["a", "b", "c", "d", "e"]
    assert version == str(world.server._version)
    assert world.server.requests[LIST] == 3


def test_the_first_list_may_be_old_and_the_watch_brings_it_up_to_date(world: World) -> None:
    world.server.put(manifest("gone"))
    world.server.lag()
    world.server.delete("default", "gone")
    world.server.put(manifest("new"))
    world.start()
    world.wait_for("new")
    assert (world.server.requests, world.server.scans) == ({LIST: 1, WATCH: 1}, 0)


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


def test_a_hundred_pods_that_come_and_go_cost_no_request_each(world: World) -> None:
    world.start()
    before = world.asked()
    for number in range(100):
        made = world.server.put(manifest(f"p{number}"))
        world.wait_for(f"p{number}")
        world.pods.find("default", f"p{number}", made["metadata"]["uid"])
        made["status"] = {"phase": "Running"}
        world.server.put(made)
        world.server.delete("default", f"p{number}")
    world.wait_for()
    assert world.asked() == before


def test_pods_asked_for_as_they_are_made_cost_one_request_each_at_most(world: World) -> None:
    world.start()
    before = world.asked()
    for number in range(100):  # at once: the watch may or may not have shown it
        made = world.server.put(manifest(f"p{number}"))
        assert world.pods.find("default", f"p{number}", made["metadata"]["uid"]).name == f"p{number}"
    more = world.asked() - before
    assert set(more) <= {"get"}
    assert more["get"] <= 100


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


def test_a_static_pod_is_known_by_what_kubelet_calls_it(world: World) -> None:
    world.server.put(manifest("static-here", annotations={"kubernetes.io/config.mirror": "hash-of-its-file"}))
    world.start()
    assert world.pods.find("default", "static-here", "hash-of-its-file").name == "static-here"
    world.server.put(manifest("static-late", node="", annotations={"kubernetes.io/config.mirror": "another"}))
    assert world.pods.find("default", "static-late", "another").name == "static-late"
    with pytest.raises(PodNotFound, match="it has UID"):
        world.pods.find("default", "static-here", "another")


def test_a_pod_being_deleted_is_not_the_one_of_that_name(world: World) -> None:
    world.server.put(manifest("web-0", deletionTimestamp="2026-01-01T00:00:00Z"))
    world.start()
    asked = world.asked()["get"]
    world.pods.find("default", "web-0", None)  # only the server can tell whether there is another by now
    assert world.asked()["get"] == asked + 1


def test_a_pod_that_does_not_exist_may_be_tried_again(world: World) -> None:
    world.start()
    with pytest.raises(PodNotFound, match="the API server does not know it") as caught:
        world.pods.find("default", "never", "u")
    assert caught.value.code == Code.TRY_AGAIN_LATER


def test_a_pod_that_makes_no_sense_hides_no_other(world: World) -> None:
    odd = manifest("odd")
    odd["spec"]["containers"] = [{"name": "app", "securityContext": {"runAsUser": "root"}}]
    world.server.put(odd)
    world.server.put(manifest("a"))
    world.start()
    world.wait_for("a")
    with pytest.raises(PodNotFound, match="Pod default/odd is malformed"):
        world.pods.find("default", "odd", odd["metadata"]["uid"])
