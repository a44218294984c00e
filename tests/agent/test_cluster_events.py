"""Kubernetes Events: what is told, how often, and that nobody waits for it."""

import time

import kubernetes_validate
import pytest

from cni.policy.pod import Pod
from installer.pods import pod_events as module
from installer.pods.pod_events import ClusterEvents
from tests.lab.cluster import NODE, World, manifest
from tests.lab.waiting import wait_until


@pytest.fixture
def pod(world: World) -> Pod:
    return Pod.model_validate(world.server.put(manifest("a")))


def told(world: World) -> list[tuple[str, int]]:
    return [(event["message"], event["count"]) for event in world.server.events]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def test_an_event_is_what_kubernetes_takes_for_one(world: World, pod: Pod) -> None:
    with ClusterEvents(world.api, NODE).running() as _, (events := ClusterEvents(world.api, NODE)).running():
        events.warning(pod, "CaptureRefused", "no good")
    (event,) = world.server.events
    kubernetes_validate.validate(event, "1.37", strict=True)
    assert event["metadata"]["namespace"] == event["involvedObject"]["namespace"] == pod.namespace
    assert event["involvedObject"]["uid"] == pod.uid
    assert (event["type"], event["reason"], event["source"]) == (
        "Warning",
        "CaptureRefused",
        {"component": "sidestep", "host": NODE},
    )


def test_a_long_name_and_message_are_cut(world: World) -> None:
    pod = Pod.model_validate(manifest("a" * 229 + "." + "b" * 20))
    events = ClusterEvents(world.api, NODE)
    with events.running():
        events.normal(pod, "CaptureRepaired", "x" * 5000)
    (event,) = world.server.events
    name = event["metadata"]["name"]
    assert len(name) <= 253
    assert all(label and label[0] != "-" and label[-1] != "-" for label in name.split("."))
    assert len(event["message"]) == 1024


def test_the_same_again_is_counted_and_something_else_is_not(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    with events.running():
        for _ in range(3):
            events.warning(pod, "CaptureRefused", "no good")
        events.normal(pod, "CaptureRepaired", "done")
    assert told(world) == [("no good", 3), ("done", 1)]
    assert world.asked() == {"create": 2, "patch": 2}


def test_what_keeps_happening_is_counted_together(world: World, pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    events = ClusterEvents(world.api, NODE)
    with events.running():
        for _ in range(100):
            events.warning(pod, "CaptureRefused", "no good")
        wait_until(lambda: events._queue.empty(), "the queue to be empty", 5)
        monkeypatch.setattr(module, "_COUNT_SECONDS", 0.0)
        events.warning(pod, "CaptureRefused", "no good")
    assert told(world) == [("no good", 101)]
    assert world.asked()["create"] == 1
    assert world.asked()["patch"] <= 4 + 2


def test_an_event_that_has_been_deleted_is_made_again(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    with events.running():
        events.warning(pod, "CaptureRefused", "no good")
        wait_until(lambda: len(world.server.events) == 1, "the Event", 5)
        world.server.events.clear()
        events.warning(pod, "CaptureRefused", "no good")
    assert told(world) == [("no good", 1)]


def test_what_happens_in_an_outage_is_told_after_it_with_its_own_time(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    with events.running():
        world.server.stop()
        for number in range(3):
            events.warning(pod, "CaptureRefused", f"message {number}")
        happened = now()
        wait_until(lambda: world.asked()["create"] >= 2 and now() > happened, "two attempts and another second", 10)
        assert world.asked()["create"] <= 3
        world.server.start()
        wait_until(lambda: len(world.server.events) == 3, "the Events", 10)
    assert [message for message, _ in told(world)] == ["message 0", "message 1", "message 2"]
    assert all(event["firstTimestamp"] <= happened for event in world.server.events)


def test_an_event_whose_answer_was_lost_is_not_made_twice(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    with events.running():
        events.warning(pod, "CaptureRefused", "no good")
        wait_until(lambda: len(world.server.events) == 1, "the Event", 5)
    again = dict(world.server.events[0])
    assert not world.api.create_event(pod.namespace, again)
    assert len(world.server.events) == 1


def test_a_refused_event_does_not_hold_up_the_others(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    world.server.failing = 403
    with events.running():
        events.warning(pod, "CaptureRefused", "first")
        wait_until(lambda: world.server.refused[403] == 1, "the refusal", 5)
        world.server.failing = 0
        events.warning(pod, "CaptureRefused", "second")
    assert told(world) == [("second", 1)]


def test_nobody_waits_and_memory_is_bounded_while_the_server_is_away(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    world.server.stop()
    with events.running():
        for number in range(1000):
            events.warning(pod, "CaptureRefused", f"message {number}")
        assert events._queue.qsize() <= 256
    assert world.asked()["create"] <= 4  # nor does the end of the agent wait for more attempts


def test_the_agents_end_does_not_wait_for_a_server_that_does_not_answer(world: World, pod: Pod) -> None:
    events = ClusterEvents(world.api, NODE)
    world.server.answering.clear()
    with events.running():
        for number in range(100):
            events.warning(pod, "CaptureRefused", f"message {number}")
        wait_until(lambda: sum(world.server.requests.values()) == 1, "the first attempt", 5)
    assert world.asked() == {}  # the attempt is still under way: it has neither been answered nor given up
