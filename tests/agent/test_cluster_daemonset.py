"""Whether an agent that ends is taken off the cluster: what it saw of its DaemonSet, and what the API server says."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from installer.pods import deployment as module
from installer.pods.deployment import Deployment, IstiosDeployment
from tests.lab.cluster import World
from tests.lab.waiting import wait_until

NAMESPACE, NAME = KEY = ("istio-system", "istio-cni-node")
PATH = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets"
GOING = {"deletionTimestamp": "2026-01-01T00:00:00Z"}


class Watched:
    """An agent's view of its DaemonSet, until it stops."""

    def __init__(self, world: World, running: ExitStack) -> None:
        self.server, self._running = world.server, running
        self.deployment = Deployment(world.api, NAMESPACE, NAME)

    def start(self) -> None:
        self._running.enter_context(self.deployment.running())
        self.wait_for_watch()

    def wait_for_watch(self) -> None:
        wait_until(lambda: self.server.daemonset_watchers(NAMESPACE) == 1, "the watch", 30)

    def wait_for(self, deleted: bool) -> None:
        wait_until(lambda: self.deployment._deleted is deleted, f"deleted to be {deleted}", 30)

    def stops(self) -> bool:
        """The agent ends; returns whether it takes the plugin away."""
        self._running.close()
        return bool(self.deployment.why_leaving())

    def asked(self) -> Counter[str]:
        return Counter({verb: self.server.requests[f"{verb} {PATH}"] for verb in ("GET", "WATCH")})


@pytest.fixture
def agent(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(module, "_TRY_ATTEMPTS", 2)
    with ExitStack() as running:
        yield Watched(world, running)


@pytest.fixture
def deployed(agent: Watched) -> Watched:
    """One that has seen its DaemonSet."""
    agent.server.put_daemonset(*KEY)
    agent.start()
    assert agent.deployment.is_known
    return agent


def forget_token(agent: Watched) -> None:
    """As when the pod that a token is bound to is deleted by force, or its account is."""
    agent.server.token = "of another"


def take_rights(agent: Watched) -> None:
    agent.server.failing = 403


def fail(agent: Watched) -> None:
    agent.server.failing = 500


def go_away(agent: Watched) -> None:
    agent.server.stop()


def test_beside_istios_daemonset_an_agent_goes_by_its_own(agent: Watched, world: World) -> None:
    beside = NAMESPACE, "sidestep-shadow-node"
    agent.server.put_daemonset(*KEY)
    agent.server.put_daemonset(*beside)
    agent.deployment = Deployment(world.api, *beside)
    agent.start()
    agent.server.delete_daemonset(*KEY)
    assert not agent.stops()
    agent.server.delete_daemonset(*beside)
    assert agent.deployment.why_leaving() == "the DaemonSet was deleted"


NO_ANSWERS = [forget_token, take_rights, fail, go_away]


def test_an_agent_that_merely_stops_leaves_everything(deployed: Watched) -> None:
    deployed.server.put_daemonset(*KEY, generation=2)  # as a rollout does
    assert not deployed.stops()


@pytest.mark.parametrize("cut", NO_ANSWERS)
def test_a_refusal_is_no_deletion(deployed: Watched, cut: object, capsys: pytest.CaptureFixture[str]) -> None:
    cut(deployed)  # type: ignore[operator]
    assert not deployed.stops()
    assert "sidestep uninstall" in capsys.readouterr().out


@pytest.mark.parametrize("cut", NO_ANSWERS)
@pytest.mark.parametrize("at_once", [True, False], ids=["deleted", "being deleted"])
def test_a_deletion_that_was_seen_counts_when_nobody_answers_any_more(
    deployed: Watched, cut: object, at_once: bool
) -> None:
    if at_once:
        deployed.server.delete_daemonset(*KEY)
    else:
        deployed.server.put_daemonset(*KEY, **GOING)
    deployed.wait_for(deleted=True)
    cut(deployed)  # type: ignore[operator]
    assert deployed.stops()


def test_an_account_that_goes_first_leaves_the_watch_that_is_open(deployed: Watched) -> None:
    forget_token(deployed)
    deployed.server.delete_daemonset(*KEY)
    deployed.wait_for(deleted=True)
    assert deployed.stops()


@pytest.mark.parametrize("going", [{}, GOING])
def test_a_deletion_that_was_not_seen_is_asked_for(agent: Watched, going: dict[str, str]) -> None:
    agent.server.put_daemonset(*KEY)
    with agent.deployment.running():
        agent.wait_for_watch()
    if going:
        agent.server.put_daemonset(*KEY, **going)
    else:
        agent.server.delete_daemonset(*KEY)
    assert agent.stops()


def test_one_that_was_never_there_cannot_be_deleted(agent: Watched) -> None:
    agent.start()
    assert not agent.stops()


def test_one_that_is_made_again_is_not_deleted(deployed: Watched) -> None:
    deployed.server.delete_daemonset(*KEY)
    deployed.wait_for(deleted=True)
    deployed.server.put_daemonset(*KEY)
    deployed.wait_for(deleted=False)
    forget_token(deployed)
    assert not deployed.stops()


def test_one_that_is_made_again_unseen_is_asked_for(deployed: Watched) -> None:
    deployed.server.delete_daemonset(*KEY)
    deployed.wait_for(deleted=True)
    deployed._running.close()
    deployed.server.put_daemonset(*KEY)
    assert not deployed.stops()


def test_a_deletion_while_no_watch_was_open_is_seen_by_the_next_list(deployed: Watched) -> None:
    deployed.server.failing = 500
    deployed.server.drop_watches()
    wait_until(lambda: deployed.server.refused[500] >= 1, "a refusal", 30)
    deployed.server.delete_daemonset(*KEY)
    deployed.server.expire()
    deployed.server.failing = 0
    deployed.wait_for(deleted=True)


def test_a_server_that_fails_at_first_is_asked_again(agent: Watched) -> None:
    agent.server.put_daemonset(*KEY)
    agent.server.failing = 500
    with agent.deployment.running():
        wait_until(lambda: agent.server.refused[500] >= 2, "two refusals", 30)
        agent.server.failing = 0
        agent.wait_for_watch()
    agent.server.delete_daemonset(*KEY)
    assert agent.deployment.why_leaving()


def test_the_last_question_is_asked_more_than_once(deployed: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRY_ATTEMPTS", 10)
    deployed._running.close()
    deployed.server.delete_daemonset(*KEY)
    deployed.server.failing = 500
    refused = deployed.server.refused

    def recover(*_: object) -> None:
        if refused[500] >= 2:
            deployed.server.failing = 0

    monkeypatch.setattr(deployed.deployment._api, "_on_request", recover)
    assert deployed.deployment.why_leaving()


def test_a_daemonset_that_changes_costs_no_request_and_is_not_sent_in_full(deployed: Watched) -> None:
    asked = deployed.asked()
    assert asked == {"GET": 1, "WATCH": 1}
    for generation in range(20):
        deployed.server.put_daemonset(*KEY, generation=generation)
    deployed.server.put_daemonset(NAMESPACE, "another")
    deployed.server.bookmark()
    deployed.server.delete_daemonset(*KEY)
    deployed.wait_for(deleted=True)
    assert deployed.asked() == asked
    assert deployed.server.sent_in_full == 0


def test_refused_lists_are_asked_for_ever_less_often(agent: Watched) -> None:
    agent.server.failing = 403
    with agent.deployment.running():
        time.sleep(3)
        assert 2 <= agent.server.refused[403] <= 8  # as in test_cluster_faults


OURS = "registry:5000/mesh/sidestep:0.1.0@sha256:0123"


def running(image: str) -> dict[str, Any]:
    """A Pod's spec."""
    return {"containers": [{"name": "side", "image": "other"}, {"name": "install-cni", "image": image}]}


def runs(agent: Watched, own: str, now: str) -> None:
    """The agent's pod has one image, and its DaemonSet one for the next pods."""
    metadata = {"namespace": NAMESPACE, "name": socket.gethostname()}
    agent.server.put({"metadata": metadata, "spec": running(own)})
    agent.server.put_daemonset(*KEY)
    agent.server.daemonsets[KEY]["spec"] = {"template": {"spec": running(now)}}


@pytest.mark.parametrize(
    "now", [OURS, "registry:5000/mesh/sidestep:0.2.0", "sidestep", "mirror.example/sidestep@sha256:4567"]
)
def test_another_version_from_anywhere_takes_over_what_is_there(deployed: Watched, now: str) -> None:
    runs(deployed, OURS, now)
    assert not deployed.stops()


@pytest.mark.parametrize("now", ["registry.istio.io/release/install-cni:1.30.1", "mesh/sidestep-old:0.1.0"])
def test_another_image_in_the_daemonset_leaves_nobody_to_serve_the_plugin(deployed: Watched, now: str) -> None:
    runs(deployed, OURS, now)
    deployed._running.close()
    why = deployed.deployment.why_leaving()
    assert why == f"the DaemonSet has another image now: {now}, not {OURS}"


def test_an_agent_whose_own_pod_is_not_known_stays(deployed: Watched) -> None:
    deployed.server.daemonsets[KEY]["spec"] = {"template": {"spec": running("istio/install-cni:1.30")}}
    assert not deployed.stops()


@pytest.fixture
def dropin(world: World, agent: Watched) -> Watched:
    """An agent in Istio's own DaemonSet."""
    agent.deployment = IstiosDeployment(world.api, NAMESPACE, NAME)  # type: ignore[assignment]
    return agent


@pytest.mark.claim("an agent ends in Istio's own DaemonSet without the right to read it")
@pytest.mark.parametrize("refused", [forget_token, take_rights])
def test_in_istios_daemonset_an_agent_that_may_not_ask_takes_the_plugin_along(dropin: Watched, refused: object) -> None:
    runs(dropin, OURS, OURS)
    refused(dropin)  # type: ignore[operator]
    with dropin.deployment.running():
        assert dropin.asked()["WATCH"] == 0
    assert "the agent may not ask whether its DaemonSet lives on" in dropin.deployment.why_leaving()
    assert dropin.asked()["GET"] <= 1  # a refusal is an answer: kubelet gives little time


def test_in_istios_daemonset_an_agent_that_may_ask_stays_for_another_version_only(dropin: Watched) -> None:
    runs(dropin, OURS, "sidestep:0.2.0")
    assert dropin.deployment.why_leaving() == ""
    runs(dropin, OURS, "istio/install-cni:1.30")
    assert "another image now: istio/install-cni:1.30" in dropin.deployment.why_leaving()
    dropin.server.delete_daemonset(*KEY)
    assert dropin.deployment.why_leaving() == "the DaemonSet was deleted"


@pytest.mark.parametrize("cut", [fail, go_away])
def test_in_istios_daemonset_no_answer_is_no_refusal(dropin: Watched, cut: object) -> None:
    runs(dropin, OURS, OURS)
    cut(dropin)  # type: ignore[operator]
    assert dropin.deployment.why_leaving() == ""
