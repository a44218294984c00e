"""The cache of this node's Pods, against an API server that does everything wrong that one can.

OUTAGE_SECONDS makes the outage longer, `make nightly` a minute.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from cni.errors import Code, PodNotFound
from installer.pods import api, cluster, listwatch
from installer.pods.access import access_of
from installer.pods.api_errors import ApiFailed
from installer.pods.cluster import ClusterPods
from installer.settings import Node
from tests.lab.apiserver import ApiServer
from tests.lab.cluster import LIST, NODE, WATCH, World, manifest, threads_and_descriptors
from tests.lab.waiting import wait_until


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
        wait_until(lambda: world.server.watchers == 1, "the watch", 5)
        fault(world.server)
        world.server.put(manifest(f"n{number}"))
        if number:
            world.server.delete("default", f"n{number - 1}")
        world.wait_for("a", f"n{number}")
    # one watch for each that broke, which the cache need not wait for; a list for each expiry, else only the first
    wait_until(lambda: world.server.requests[WATCH] >= 5, "the last watch", 10)
    assert world.server.requests == {LIST: 5 if fault is expire else 1, WATCH: 5}


def test_a_server_that_has_fallen_behind_is_asked_for_what_it_has(world: World) -> None:
    world.server.put(manifest("a"))
    world.start()
    world.pods._watch._version = "999999"  # as another server of the cluster might have said
    world.pods._watch._list_again = 0.0
    world.server.drop_watches()
    world.server.put(manifest("b"))
    world.wait_for("a", "b")
    wait_until(lambda: world.server.requests[WATCH] >= 2, "another watch", 10)
    assert world.server.requests == {LIST: 3, WATCH: 2}
    assert world.server.scans == 1


def test_listing_again_after_a_time_costs_no_scan(world: World) -> None:
    world.server.put(manifest("a"))
    world.start()
    world.pods._watch._list_again = 0.0
    world.server.put(manifest("b"))
    world.wait_for("a", "b")
    wait_until(lambda: world.server.requests[WATCH] == 2, "another watch", 5)
    assert (world.server.requests[LIST], world.server.scans) == (2, 0)


def test_a_new_token_is_read_when_the_old_one_is_refused(world: World) -> None:
    world.start()
    world.server.token = "second"
    world.server.drop_watches()
    wait_until(lambda: world.server.refused[401] >= 2, "refusals", 5)
    asked = world.asked()["get"]
    with pytest.raises(ApiFailed, match="401 Unauthorized"):
        world.api.get_pod("default", "a")
    assert world.asked()["get"] == asked + 1  # the same token is not tried twice
    world.server.kubeconfig(world.kubeconfig)
    made = world.server.put(manifest("a"))
    assert world.pods.find("default", "a", made["metadata"]["uid"]).name == "a"
    world.wait_for("a")


def test_refused_credentials_are_not_answered_with_a_storm(world: World) -> None:
    world.start()
    world.server.token = "second"
    world.server.drop_watches()
    time.sleep(3)
    assert 2 <= world.server.refused[401] <= 8  # pauses from 0.25 s, doubled: 0.125 + 0.25 + 0.5 + 1 + 2 s at the least


def test_a_service_account_is_renewed_by_kubelet_and_read_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", world.server.address)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(world.server.port))
    account = world.server.service_account(tmp_path / "account")
    api = world.reach(access_of(Node(), account))
    world.server.put(manifest("a"))
    assert api.get_pod("default", "a") is not None
    world.server.token = "second"
    world.server.service_account(account)
    assert api.get_pod("default", "a") is not None
    assert world.server.refused[401] == 0  # it was read before anybody refused the old one


def test_a_slow_server_is_waited_for(world: World) -> None:
    world.start()
    made = world.server.put(manifest("slow", node=""))
    world.server.latency = 5.0
    world.server.drop_watches()
    assert world.pods.find("default", "slow", made["metadata"]["uid"]).name == "slow"
    world.server.put(manifest("a"))
    world.wait_for("a")
    assert world.server.requests["GET /api/v1/namespaces/default/pods/slow"] == 1
    assert (world.server.requests[LIST], world.server.requests[WATCH]) == (1, 2)
    world.server.latency = 0.0


def test_errors_are_not_answered_with_a_storm(world: World) -> None:
    world.start()
    world.server.failing = 500
    world.server.drop_watches()
    with pytest.raises(PodNotFound, match="500 on demand"):
        world.pods.find("default", "a", "u")
    time.sleep(2)
    # find: three; the watch, in these four seconds: pauses from 0.25 s, doubled
    assert world.asked()["get"] == 3
    assert world.server.refused[500] <= 3 + 8
    world.server.failing = 0
    world.server.put(manifest("a"))
    world.wait_for("a")


def test_an_outage_leaves_nothing_behind_and_nothing_out(world: World) -> None:
    seconds = float(os.environ.get("OUTAGE_SECONDS", "3"))
    for number in range(20):
        world.server.put(manifest(f"p{number}"))
    world.start()
    threads, descriptors = threads_and_descriptors()
    world.server.stop()
    began = time.monotonic()
    asked = len(world.requests)
    for number in range(10):
        world.server.delete("default", f"p{number}")
        world.server.put(manifest(f"q{number}"))
    with pytest.raises(PodNotFound, match="cannot be reached: Connection refused") as caught:
        world.pods.find("default", "q1", "u")
    assert caught.value.code == Code.TRY_AGAIN_LATER
    assert world.pods.find("default", "p15", None).name == "p15"
    while time.monotonic() - began < seconds:
        time.sleep(0.1)
    # find: three; the watch: pauses doubled from 0.25 s to 30 s, each at least half of that
    assert len(world.requests) - asked <= 3 + 8 + seconds / 15
    world.server.start()
    world.wait_for(*(f"p{n}" for n in range(10, 20)), *(f"q{n}" for n in range(10)), seconds=35)
    wait_until(lambda: threads_and_descriptors()[0] <= threads, "threads to end", 5)
    wait_until(lambda: threads_and_descriptors()[1] <= descriptors + 2, "descriptors to be closed", 5)


def test_a_server_that_takes_requests_and_never_answers_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_FIND_SECONDS", cluster._FIND_SECONDS / 8)
    world.start()
    world.server.answering.clear()
    with pytest.raises(PodNotFound, match="cannot be reached") as caught:
        world.pods.find("default", "a", "u")
    assert caught.value.code == Code.TRY_AGAIN_LATER
    assert world.asked()["get"] == 1


@pytest.fixture
def dribbling(world: World) -> Iterator[World]:
    """A server that sends a byte of each answer, of its headers first, every 50 ms."""
    world.server.dribble = 0.05
    yield world
    world.server.dribble = 0.0


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_comes_byte_by_byte_is_given_up_in_time(dribbling: World, status: int) -> None:
    dribbling.server.put(manifest("a"))
    dribbling.server.failing = status if status != 200 else 0
    began = time.monotonic()
    with pytest.raises(ApiFailed, match="cannot be reached: Read timed out"):
        dribbling.api.get_pod("default", "a", 1.0)
    assert 0.9 < time.monotonic() - began < 2.0
    dribbling.server.dribble = 0.0
    dribbling.server.failing = 0
    found = dribbling.api.get_pod("default", "a", 1.0)
    assert found is not None and found.name == "a"


def test_a_body_that_comes_byte_by_byte_is_given_up_in_time(world: World) -> None:
    world.server.put(manifest("a", annotations={"long": "x" * 4000}))
    began = time.monotonic()
    with pytest.raises(ApiFailed, match="is broken"):
        world.server.dribble = 0.002  # some 120 bytes of headers, and 4,000 of a body
        world.api.get_pod("default", "a", 2.0)
    assert time.monotonic() - began < 3.0
    world.server.dribble = 0.0


def test_a_list_and_a_watch_that_come_byte_by_byte_are_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(listwatch, "_LONGEST_PAUSE", 0.5)
    world.server.bookmark_seconds = 0.5
    world.server.put(manifest("a"))
    world.start()
    world.server.dribble = 0.2
    world.server.drop_watches()
    wait_until(lambda: world.server.requests[WATCH] >= 3, "another watch to be asked for", 8)
    world.pods._watch._list_again = 0.0
    wait_until(lambda: world.server.requests[LIST] >= 3, "another list to be asked for", 30)
    world.server.dribble = 0.0
    world.server.put(manifest("b"))
    world.wait_for("a", "b")


def test_a_change_that_comes_byte_by_byte_ends_the_watch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_SILENCE_SECONDS", 2.0)
    world.server.bookmark_seconds = 0.5
    world.start()
    world.server.dribble = 0.2
    world.server.put(manifest("a"))
    wait_until(lambda: world.server.requests[WATCH] >= 2, "another watch to be asked for", 10)
    world.server.dribble = 0.0
    world.wait_for("a")


def test_the_server_is_given_up_before_the_plugin_gives_up_the_agent() -> None:
    assert Node().agent_timeout_seconds > cluster._FIND_SECONDS


def test_stopping_does_not_wait_for_a_quiet_watch(world: World) -> None:
    threads = threads_and_descriptors()[0]
    with world.pods.running():
        assert world.pods.wait_synced(5)
        wait_until(lambda: world.server.watchers == 1, "the watch", 5)
        watching = {each for each in threading.enumerate() if each.name == "pods"}
    assert len(watching) == 1
    assert not any(each.is_alive() for each in watching)  # it has ended, it was not given up
    wait_until(lambda: threads_and_descriptors()[0] <= threads + 1, "the thread to end", 5)  # the server's own is left


def test_stopping_does_not_wait_for_a_server_that_does_not_answer(world: World) -> None:
    world.server.answering.clear()
    with world.pods.running():
        wait_until(lambda: world.server.requests[LIST] == 1, "the list to be asked for", 5)
    assert world.asked() == {}  # it is still under way: it has neither been answered nor given up
    world.server.answering.set()


def test_another_servers_certificate_is_an_outage_like_any_other(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    trustme.CA().cert_pem.write_to_path(other)
    api = world.reach(access_of(Node(kubeconfig=world.kubeconfig, kube_ca_file=other)))
    with pytest.raises(ApiFailed, match="cannot be reached: certificate verify failed"):
        api.get_pod("default", "a")
    with pytest.raises(PodNotFound, match="certificate verify failed") as caught:
        ClusterPods(api, NODE).find("default", "a", "u")
    assert caught.value.code == Code.TRY_AGAIN_LATER
    assert not sum(world.server.requests.values())


def test_a_certificate_is_not_looked_at_when_that_is_asked_for(world: World, tmp_path: Path) -> None:
    settings = Node(kubeconfig=world.kubeconfig, kube_ca_file=tmp_path / "never", skip_tls_verify=True)
    assert world.reach(access_of(settings)).list_pods(NODE)[0] == []
