"""Broken pods deleted and labelled through the API server, which they keep changing."""

import uuid
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from cni.enrolment.adoption import Adoption
from cni.policy.pod import Pod
from installer.agent import repair as module
from installer.agent.repair import Repairs
from installer.settings import Repair
from tests.lab.cluster import World, manifest

LABEL = ("cni.istio.io/uninitialized", "true")
GET = "GET /api/v1/namespaces/default/pods/web"


def broken(uid: str, restarts: int = 1, exit_code: int = 126, **metadata: Any) -> dict[str, Any]:
    """A mesh pod whose validation has failed so many times."""
    annotations = {"sidecar.istio.io/status": "{}"}
    last = {"terminated": {"exitCode": exit_code, "reason": "Error"}}
    status = {"name": "istio-validation", "restartCount": restarts, "state": {"waiting": {}}, "lastState": last}
    made = manifest("web", uid=uid, annotations=annotations, **metadata)
    made["spec"]["containers"] = [{"name": "istio-proxy", "args": ["proxy", "sidecar"]}]
    return made | {"status": {"initContainerStatuses": [status]}}


@dataclass
class Acting:
    """Repairs over a real client."""

    world: World
    kind: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    enrolled: bool = False
    told: list[str] = field(default_factory=list)
    counted: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        deleting = self.kind == "delete"
        self.repairs = Repairs(
            settings=Repair(repair_repair_pods=False, repair_delete_pods=deleting, repair_label_pods=not deleting),
            actions=self.world.api,
            adoption=cast(Adoption, None),
            is_enrolled=lambda _: self.enrolled,
            events=self,
            observe=lambda kind, result: self.counted.append((kind, result)),
        )

    def put(self, **changes: Any) -> Pod:
        return Pod.model_validate(self.world.server.put(broken(self.uid, **changes)))

    @property
    def results(self) -> list[str]:
        assert {kind for kind, _ in self.counted} <= {self.kind}
        return [result for _, result in self.counted]

    @property
    def is_done(self) -> bool:
        pod = self.world.server.pods.get(("default", "web"))
        return pod is None if self.kind == "delete" else bool(pod and pod["metadata"].get("labels") == dict([LABEL]))

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        self.told.append(reason)

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        raise AssertionError(reason)


@pytest.fixture(params=["delete", "label"])
def acting(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> Acting:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.02)
    return Acting(world, request.param)


def test_one_that_has_changed_since_is_looked_at_again(acting: Acting) -> None:
    stale = acting.put()
    acting.put(restarts=2)
    acting.repairs.changed(None, stale)
    assert acting.is_done
    assert (acting.results, len(acting.told)) == (["success"], 1)
    assert acting.world.server.requests[GET] == 1


def test_one_that_is_as_it_was_seen_is_not_looked_at_again(acting: Acting) -> None:
    acting.repairs.changed(None, acting.put())
    assert acting.is_done
    assert acting.world.server.requests[GET] == 0


def test_one_that_keeps_changing_is_tried_five_times_and_again_at_its_next_change(acting: Acting) -> None:
    pod = acting.put()
    acting.world.server.conflicts = 100
    acting.repairs.changed(None, pod)
    assert (acting.results, acting.told) == (["fail"], [])
    assert (acting.world.server.requests[GET], len(acting.world.server.written)) == (4, 5)
    acting.world.server.conflicts = 4
    acting.repairs.changed(pod, acting.put(restarts=3))
    assert (acting.results, len(acting.told)) == (["fail", "success"], 1)
    assert acting.is_done


def test_one_that_is_gone_is_let_go(acting: Acting) -> None:
    pod = acting.put()
    acting.world.server.delete("default", "web")
    acting.repairs.changed(None, pod)
    acting.repairs.changed(pod, pod)
    assert (acting.results, acting.told) == (["skip"], [])


@pytest.mark.parametrize(
    "change",
    [{"exit_code": 0}, {"deletionTimestamp": "2026-01-01T00:00:00Z"}, {"labels": {"sidecar.istio.io/inject": "false"}}],
)
def test_one_that_needs_it_no_more_is_left_alone(acting: Acting, change: dict[str, Any]) -> None:
    stale = acting.put()
    acting.put(**change)
    acting.repairs.changed(None, stale)
    assert (acting.results, acting.told, acting.is_done) == (["skip"], [], False)
    assert len(acting.world.server.written) == 1


def test_another_of_the_same_name_is_left_alone(acting: Acting) -> None:
    stale = acting.put()
    acting.world.server.put(broken(str(uuid.uuid4())))
    acting.repairs.changed(None, stale)
    assert (acting.results, acting.told, acting.is_done) == (["skip"], [], False)


@pytest.mark.parametrize(
    ("labels", "fields", "chosen"),
    [
        ("app=web,tier=front", "", True),
        ("app=web,tier=back", "", False),
        ("", "metadata.namespace=default", True),
        ("app=web", "metadata.namespace=shop", False),
    ],
)
def test_selectors_are_the_api_servers(world: World, labels: str, fields: str, chosen: bool) -> None:
    made = world.server.put(broken(str(uuid.uuid4()), labels={"app": "web", "tier": "front"}))
    assert world.api.selects_pod(Pod.model_validate(made), labels, fields) is chosen
    again = world.server.put(broken(str(uuid.uuid4()), labels={"app": "web", "tier": "front"}))
    assert not world.api.selects_pod(Pod.model_validate(made), labels, fields), "another of that name"
    assert world.api.selects_pod(Pod.model_validate(again), labels, fields) is chosen
