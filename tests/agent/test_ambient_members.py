"""What an agent makes of labels, namespaces and ztunnels: which pods are in the mesh, and what is said of them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cni.policy.pod import Pod
from installer.ambient import members as members_module
from installer.ambient.members import NotReady
from tests.lab.ambient import AMBIENT, MODE, REDIRECTION, AmbientNode, identity_of
from tests.lab.cluster import World
from tests.lab.netns_fds import Namespace, namespaces, occupied
from tests.lab.waiting import wait_until
from tests.lab.zds_client import Ztunnel, wait_ready


@pytest.fixture
def netns() -> Iterator[list[Namespace]]:
    with namespaces(3) as made:
        yield made


@pytest.fixture
def node(world: World, tmp_path: Path) -> AmbientNode:
    return AmbientNode(world, tmp_path / "ztunnel.sock")


def running(node: AmbientNode, name: str, where: Namespace, labels: dict[str, str] | None = None) -> Pod:
    """A Pod that runs, in a namespace."""
    pod = node.pod(name, labels)
    node.sandboxes[pod.uid or ""] = where
    return pod


def ztunnel(up: ExitStack, node: AmbientNode, ports: tuple[int, ...] = ()) -> Ztunnel:
    connected = up.enter_context(Ztunnel(node.socket, ports).running())
    wait_ready(connected)
    return connected


@pytest.fixture
def up() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_pods_that_run_already_come_in_with_capture_ztunnel_and_annotation(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app, other = running(node, "app", netns[0], AMBIENT), running(node, "other", netns[1])
    up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    assert node.table.enrolled() == {netns[0].cookie: app.uid}
    assert told.proxies[app.uid or ""].namespace == netns[0].identity
    assert told.described[app.uid or ""] == ("app", "default", "cart")
    assert node.redirection("other") is None and other.uid not in told.proxies


def test_a_label_that_comes_and_goes_brings_the_running_pod_in_and_out(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0])
    up.enter_context(node.agent())
    told = ztunnel(up, node)
    for _ in range(3):
        node.pod("app", AMBIENT)
        node.wait_redirection("app", "enabled")
        assert app.uid in told.proxies and netns[0].cookie in node.table.rows
        node.pod("app")
        node.wait_redirection("app", None)
        assert app.uid not in told.proxies and not node.table.rows


def test_a_namespaces_label_brings_its_pods_in_and_out_but_not_those_that_say_none(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    running(node, "app", netns[0])
    running(node, "out", netns[1], {MODE: "none"})
    running(node, "own", netns[2], AMBIENT)
    up.enter_context(node.agent())
    ztunnel(up, node)
    node.wait_redirection("own", "enabled")
    node.world.server.put_namespace("default", AMBIENT)
    node.wait_redirection("app", "enabled")
    node.world.server.put_namespace("default")
    node.wait_redirection("app", None)
    assert node.redirection("out") is None and node.redirection("own") == "enabled"


@pytest.mark.parametrize("what", ["sidecar", "ended"])
def test_a_pod_that_gets_a_sidecar_or_ends_leaves(
    node: AmbientNode, netns: list[Namespace], up: ExitStack, what: str
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    changed = node.world.server.pods["default", "app"]
    if what == "ended":
        changed["status"]["phase"] = "Succeeded"
    else:
        changed["metadata"]["annotations"]["sidecar.istio.io/status"] = "{}"
    node.world.server.put(changed)
    node.wait_redirection("app", None)
    assert app.uid not in told.proxies and not node.table.rows


def test_a_deleted_pod_is_taken_back_from_ztunnel_which_would_keep_its_namespace_alive(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    node.table.leave(netns[0].cookie)  # as the DEL does
    agent.removed(netns[0].cookie)
    wait_until(lambda: told.received("del") == [app.uid], "ztunnel to be told")
    agent.once()
    assert not node.table.rows, "somebody is still in it, but it is ending"
    node.sandboxes.clear()
    node.world.server.delete("default", "app")
    wait_until(lambda: not agent.zds.held(), "it to be forgotten")


def test_a_pod_that_is_gone_without_a_del_is_taken_back_as_well(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    node.world.server.delete("default", "app")
    wait_until(lambda: not node.world.names(), "the watch to know")
    agent.once()
    assert app.uid in told.proxies, "the list may be older than an ADD"
    agent.once()
    assert app.uid not in told.proxies


def test_a_pod_that_ended_while_no_agent_ran_is_taken_back_though_ztunnel_was_told_to_keep_it(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    told = up.enter_context(Ztunnel(node.socket, ()).running())
    with node.agent():
        node.wait_redirection("app", "enabled")
    node.sandboxes.clear()
    node.world.server.delete("default", "app")
    wait_until(lambda: not node.world.names(), "the watch to know")
    with node.agent() as agent:
        wait_until(lambda: told.received("keep") == [app.uid], "the snapshot")
        agent.once()
        agent.once()
        assert app.uid not in told.proxies


def test_an_annotation_from_before_a_reboot_is_no_reason_to_do_nothing(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    node.pod("app", AMBIENT, annotations={REDIRECTION: "enabled"})
    node.sandboxes[app.uid or ""] = netns[0]
    up.enter_context(node.agent())
    told = ztunnel(up, node)
    wait_until(lambda: app.uid in told.proxies, "the pod to be brought in")
    assert node.table.enrolled() == {netns[0].cookie: app.uid}


def test_an_annotation_on_a_pod_that_is_none_of_ours_is_taken_away(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    running(node, "app", netns[0])
    node.pod("app", annotations={REDIRECTION: "enabled", "other": "stays"})
    up.enter_context(node.agent())
    node.wait_redirection("app", None)
    assert node.annotations("app") == {"other": "stays"}


def test_a_pod_in_a_new_sandbox_is_handed_over_anew(node: AmbientNode, netns: list[Namespace], up: ExitStack) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    node.sandboxes[app.uid or ""] = netns[1]  # and no ADD has told
    agent.once()
    assert told.proxies[app.uid or ""].namespace == netns[1].identity
    assert node.table.whose(netns[1].cookie) == app.uid


def test_without_a_ztunnel_a_pod_is_captured_and_pending_and_its_owner_is_told_why_once(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    node.wait_redirection("app", "pending")
    assert node.table.enrolled() == {netns[0].cookie: app.uid}, "it is closed, not open"
    agent.once()
    agent.once()
    wait_until(lambda: node.reasons("app") == ["AmbientPending"], "one Event")
    assert "no ztunnel is connected" in node.world.server.events[0]["message"]
    assert agent.states() == {"enabled": 0, "pending": 1}
    ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    wait_until(lambda: node.reasons("app") == ["AmbientPending", "AmbientEnabled"], "the second Event")
    assert agent.states() == {"enabled": 1, "pending": 0}


def test_a_ztunnel_that_is_away_for_a_moment_changes_no_annotation_and_for_long_it_does(
    node: AmbientNode, netns: list[Namespace], up: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    first = ExitStack()
    ztunnel(first, node)
    node.wait_redirection("app", "enabled")
    patches = len(node.world.server.written)
    first.close()
    wait_until(lambda: agent.states() == {"enabled": 0, "pending": 1}, "the agent to notice")
    agent.once()
    assert len(node.world.server.written) == patches
    again = ExitStack()
    ztunnel(again, node)
    wait_until(lambda: agent.states() == {"enabled": 1, "pending": 0}, "the agent to notice")
    assert len(node.world.server.written) == patches
    monkeypatch.setattr(members_module, "_ENABLED_AWAY_SECONDS", 0.0)
    again.close()
    node.wait_redirection("app", "pending")


def test_a_pod_that_ztunnel_refuses_is_pending_with_ztunnels_words_and_tried_again(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    up.enter_context(node.agent())
    told = ztunnel(up, node, ports=(15008,))
    node.wait_redirection("app", "enabled")
    node.pod("app")
    node.wait_redirection("app", None)
    with occupied(netns[0].fd, 15008):
        node.pod("app", AMBIENT)
        node.wait_redirection("app", "pending")
        wait_until(lambda: node.reasons("app") == ["AmbientPending"], "the Event")
        assert "failure to start proxy: Address already in use" in node.world.server.events[0]["message"]
    node.wait_redirection("app", "enabled")
    assert app.uid in told.proxies


def test_an_add_is_done_once_ztunnel_has_accepted(node: AmbientNode, netns: list[Namespace], up: ExitStack) -> None:
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node)
    app = node.pod("app", AMBIENT, phase="Pending", annotations={"ambient.istio.io/dns-capture": "false"})
    assert agent.why_not(app) is None
    assert agent.enrol(app, lambda _: identity_of(app), netns[0].fd) == netns[0].cookie
    assert told.proxies[app.uid or ""].namespace == netns[0].identity
    assert node.redirection("app") == "enabled"
    assert node.table.policies[netns[0].cookie].dns_capture is False


def test_a_second_sandbox_whose_add_fails_leaves_nothing_and_the_first_stays(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node, (15008,))
    node.wait_redirection("app", "enabled")
    with occupied(netns[1].fd, 15008), pytest.raises(NotReady, match="failure to start proxy"):
        agent.enrol(app, lambda _: identity_of(app), netns[1].fd)
    assert node.table.whose(netns[1].cookie) is None
    wait_until(lambda: app.uid in told.proxies, "the first to be handed over again")
    assert told.proxies[app.uid or ""].namespace == netns[0].identity


def test_an_add_that_succeeds_after_one_that_failed_leaves_nothing_to_try(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    agent = up.enter_context(node.agent())
    app = node.pod("app", AMBIENT, phase="Pending")
    with pytest.raises(NotReady):
        agent.enrol(app, lambda _: identity_of(app), netns[0].fd)
    ztunnel(up, node)
    agent.enrol(app, lambda _: identity_of(app), netns[0].fd)
    node.wait_redirection("app", "enabled")
    wait_until(lambda: not agent._attempts.known() and agent.states()["pending"] == 0, "nothing to be left to do")


def test_an_add_without_a_ztunnel_fails_leaves_nothing_and_the_pod_is_pending(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    agent = up.enter_context(node.agent())
    app = node.pod("app", AMBIENT, phase="Pending")
    with pytest.raises(NotReady, match="no ztunnel is connected"):
        agent.enrol(app, lambda _: identity_of(app), netns[0].fd)
    assert not node.table.rows
    node.wait_redirection("app", "pending")
    wait_until(lambda: node.reasons("app")[:1] == ["AmbientPending"], "the Event")
    told = ztunnel(up, node)
    agent.enrol(app, lambda _: identity_of(app), netns[0].fd)
    assert node.redirection("app") == "enabled" and app.uid in told.proxies


def test_an_add_whose_annotation_is_refused_fails_and_ztunnel_lets_go(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node)
    app = node.pod("app", AMBIENT, phase="Pending")
    node.world.server.forbidden = {"PATCH"}
    with pytest.raises(NotReady, match="PATCH is forbidden"):
        agent.enrol(app, lambda _: identity_of(app), netns[0].fd)
    wait_until(lambda: app.uid not in told.proxies, "ztunnel to let go")
    assert not node.table.rows


def test_an_unknown_namespace_makes_an_add_wait_and_changes_nothing_of_running_pods(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    node.world.server.delete_namespace("default")
    wait_until(lambda: node.namespaces.labels_of("default") is None, "the watch to know")
    agent.once()
    assert app.uid in told.proxies and node.redirection("app") == "enabled"
    with pytest.raises(NotReady, match="the labels of namespace default are not known"):
        agent.why_not(app)


def test_an_agent_that_starts_again_tells_ztunnel_of_what_is_captured_and_its_proxies_stay(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    told = up.enter_context(Ztunnel(node.socket, ()).running())
    with node.agent():
        node.wait_redirection("app", "enabled")
        proxy = told.proxies[app.uid or ""]
    patches = len(node.world.server.written)
    with node.agent() as agent:
        wait_until(lambda: agent.states() == {"enabled": 1, "pending": 0}, "the snapshot")
        agent.once()
        assert told.proxies[app.uid or ""] is proxy
        assert len(node.world.server.written) == patches


def test_pods_whose_namespace_is_not_found_are_kept_and_named(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    told = up.enter_context(Ztunnel(node.socket, ()).running())
    with node.agent():
        node.wait_redirection("app", "enabled")
    node.sandboxes.clear()
    with node.agent():
        wait_until(lambda: told.received("keep") == [app.uid], "the snapshot")
        assert app.uid in told.proxies
        node.wait_redirection("app", "pending")
        wait_until(lambda: "AmbientPending" in node.reasons("app"), "the Event")
        assert "processes are not found" in node.world.server.events[-1]["message"]


def test_capture_that_is_refused_is_told_and_ztunnel_gets_nothing(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    node.table.refusal = "the table is full"
    up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.wait_redirection("app", "pending")
    assert app.uid not in told.proxies
    node.table.refusal = ""
    node.wait_redirection("app", "enabled")


def test_an_api_server_that_is_away_delays_annotations_and_nothing_else(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0])
    up.enter_context(node.agent())
    told = ztunnel(up, node)
    node.world.server.failing = 503
    node.pod("app", AMBIENT)
    wait_until(lambda: app.uid in told.proxies, "the pod to be brought in")
    assert node.redirection("app") is None
    node.world.server.failing = 0
    node.wait_redirection("app", "enabled", 30)


def test_what_does_not_concern_ambient_mode_costs_no_look_for_namespaces(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    running(node, "app", netns[0], AMBIENT)
    up.enter_context(node.agent())
    ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    wait_until(lambda: node.world.pods.find("default", "app", None).annotations.get(REDIRECTION) == "enabled", "it")
    wait_until(lambda: node.is_at_rest(), "the looks that the start has caused")
    before = node.walks
    for number in range(5):
        node.pod("app", {**AMBIENT, "n": str(number)})
        node.world.server.put_namespace("default", {"n": str(number)})
    wait_until(lambda: node.world.pods.find("default", "app", None).labels.get("n") == "4", "the watch to know")
    node.members.once(set(node.sandboxes))
    assert node.walks == before


def test_each_pod_is_told_of_with_its_state_and_the_reason(
    node: AmbientNode, netns: list[Namespace], up: ExitStack
) -> None:
    app = running(node, "app", netns[0], AMBIENT)
    agent = up.enter_context(node.agent())
    node.wait_redirection("app", "pending")
    nobody = f"no ztunnel is connected to {node.socket}"
    waiting = {"pod": "default/app", "uid": app.uid, "state": "pending", "reason": nobody}
    assert agent.document() == {"ztunnels": 0, "problem": nobody, "pods": [waiting]}
    ztunnel(up, node)
    node.wait_redirection("app", "enabled")
    lost = node.pod("lost", AMBIENT)
    node.wait_redirection("lost", "pending")
    assert agent.document() == {
        "ztunnels": 1,
        "problem": "",
        "pods": [
            {"pod": "default/app", "uid": app.uid, "state": "ambient", "reason": ""},
            {
                "pod": "default/lost",
                "uid": lost.uid,
                "state": "pending",
                "reason": "its processes are not found on this node",
            },
        ],
    }
