"""What ambient mode asks of the API server: the labels of the cluster's namespaces, and an annotation of Pods."""

from collections.abc import Iterator

import pytest

from cni.policy.pod import Pod
from installer.pods.api_errors import ApiFailed, Conflict
from installer.pods.namespaces import ClusterNamespaces
from tests.lab.cluster import World, manifest
from tests.lab.waiting import wait_until

AMBIENT = {"istio.io/dataplane-mode": "ambient"}
KEY = "ambient.istio.io/redirection"


@pytest.fixture
def namespaces(world: World) -> Iterator[ClusterNamespaces]:
    """Not started yet."""
    yield ClusterNamespaces(world.api)


def start(world: World, namespaces: ClusterNamespaces) -> None:
    world.running.enter_context(namespaces.running())
    assert namespaces.wait_synced(5)
    wait_until(lambda: world.asked()["watch"] == 1, "the watch", 5)


def test_labels_of_namespaces_come_change_and_go(world: World, namespaces: ClusterNamespaces) -> None:
    heard: list[tuple[str, dict[str, str], dict[str, str]]] = []
    namespaces.subscribe(lambda name, before, after: heard.append((name, before, after)))
    world.server.put_namespace("shop")
    assert namespaces.labels_of("shop") is None
    assert namespaces.why_stale() == "not listed yet"
    start(world, namespaces)
    assert namespaces.labels_of("shop") == {} and namespaces.labels_of("elsewhere") is None
    world.server.put_namespace("shop", AMBIENT)
    world.server.put_namespace("shop", AMBIENT)
    world.server.put_namespace("shop")
    world.server.put_namespace("bank", AMBIENT)
    world.server.delete_namespace("bank")
    wait_until(lambda: len(heard) == 4, f"four changes, not {heard}")
    assert heard == [("shop", {}, AMBIENT), ("shop", AMBIENT, {}), ("bank", {}, AMBIENT), ("bank", AMBIENT, {})]
    assert namespaces.labels_of("bank") is None and not namespaces.why_stale()


def test_what_changes_during_an_outage_is_heard_afterwards(world: World, namespaces: ClusterNamespaces) -> None:
    heard: list[tuple[str, dict[str, str], dict[str, str]]] = []
    world.server.put_namespace("shop", AMBIENT)
    world.server.put_namespace("bank", AMBIENT)
    start(world, namespaces)
    namespaces.subscribe(lambda name, before, after: heard.append((name, before, after)))
    world.server.stop()
    world.server.put_namespace("shop")
    world.server.delete_namespace("bank")
    world.server.expire()
    world.server.start()
    wait_until(lambda: len(heard) == 2, "both changes")
    assert sorted(heard) == [("bank", AMBIENT, {}), ("shop", AMBIENT, {})]


def test_only_the_metadata_of_namespaces_is_asked_for(world: World, namespaces: ClusterNamespaces) -> None:
    world.server.put_namespace("shop", AMBIENT)
    start(world, namespaces)
    assert world.server.requests["GET /api/v1/namespaces"] == 1
    assert world.server.sent_in_full == 0


def test_a_pod_gets_an_annotation_changes_it_and_loses_it(world: World) -> None:
    pod = Pod.model_validate(world.server.put(manifest("app", annotations={"other": "stays"})))
    for value in ("pending", "enabled"):
        assert world.api.annotate_pod(pod, KEY, value)
        assert _annotations(world) == {"other": "stays", KEY: value}
    assert world.api.annotate_pod(pod, KEY, None)
    assert _annotations(world) == {"other": "stays"}
    assert world.server.requests["PATCH /api/v1/namespaces/default/pods/app/status"] == 3


def test_a_pod_that_is_gone_gets_none_and_neither_does_a_newer_one_of_its_name(world: World) -> None:
    pod = Pod.model_validate(world.server.put(manifest("app")))
    world.server.put(manifest("app"))
    with pytest.raises(Conflict):
        world.api.annotate_pod(pod, KEY, "enabled")
    assert _annotations(world) == {}
    world.server.delete("default", "app")
    assert not world.api.annotate_pod(pod, KEY, "enabled")


def test_without_the_right_the_words_of_the_server_are_told(world: World) -> None:
    pod = Pod.model_validate(world.server.put(manifest("app")))
    world.server.forbidden = {"PATCH"}
    with pytest.raises(ApiFailed, match="PATCH is forbidden"):
        world.api.annotate_pod(pod, KEY, "enabled")


def _annotations(world: World) -> dict[str, str]:
    found: dict[str, str] = world.server.pods["default", "app"]["metadata"].get("annotations") or {}
    return found
