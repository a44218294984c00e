"""Which pods are broken, what is done about them, and that it is done once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from bpf.errors import SidestepError
from cni.enrolment.adoption import Adopted, Adoption
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod
from installer.agent.repair import Repairs
from installer.pods.api_errors import ApiFailed
from installer.settings import Repair


def pod(state: dict[str, Any] | None = None, last: dict[str, Any] | None = None, **metadata: Any) -> Pod:
    """A mesh pod whose validation is in the given states."""
    status = {"name": "istio-validation", "state": state or {"waiting": {}}, "lastState": last or {}}
    return Pod.model_validate(
        {
            "metadata": {
                "name": "web",
                "namespace": "default",
                "uid": "u",
                "annotations": {"sidecar.istio.io/status": "{}"},
                **metadata,
            },
            "spec": {"containers": [{"name": "istio-proxy", "args": ["proxy", "sidecar"]}], "nodeName": "here"},
            "status": {"podIP": "10.0.0.2", "initContainerStatuses": [status]},
        }
    )


def ended(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "reason": reason}}


@dataclass
class World:
    """Everything that repair touches, and what it did with it."""

    problem: str = ""
    left_alone: str = ""
    found: bool = True
    enrolled: bool = False
    answer: bool | ApiFailed = True
    selected: bool | ApiFailed = True
    adopted: int = 0
    asked: list[str] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    counted: list[tuple[str, str]] = field(default_factory=list)

    def repairs(self, actions: bool = True, **settings: Any) -> Repairs:
        return Repairs(
            settings=Repair(**settings),
            actions=self if actions else None,
            adoption=cast(Adoption, self),
            is_enrolled=lambda pod: self.enrolled,
            events=self,
            observe=lambda kind, result: self.counted.append((kind, result)),
        )

    def adopt(self, pods: list[Pod]) -> Iterator[Adopted]:
        self.adopted += 1
        if self.found:
            yield Adopted(pods[0], self.problem, self.left_alone)

    def get_pod(self, namespace: str, name: str) -> Pod | None:
        raise AssertionError("asked for without need")

    def selects_pod(self, pod: Pod, labels: str, fields: str) -> bool:
        self.asked.append(f"select {labels} {fields}")
        if isinstance(self.selected, ApiFailed):
            raise self.selected
        return self.selected

    def delete_pod(self, pod: Pod) -> bool:
        return self._ask("delete")

    def label_pod(self, pod: Pod, key: str, value: str) -> bool:
        return self._ask(f"label {key}={value}")

    def _ask(self, what: str) -> bool:
        self.asked.append(what)
        if isinstance(self.answer, ApiFailed):
            raise self.answer
        return self.answer

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        self.told.append(("Warning", reason))

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        self.told.append(("Normal", reason))


BROKEN = pod(last=ended(126))


@pytest.mark.parametrize(
    ("state", "last", "broken"),
    [
        (None, None, False),
        (None, ended(126), True),
        (None, ended(1), False),
        (ended(126), None, False),
        (ended(126), ended(126), True),
        (ended(0, reason="Completed"), ended(126), False),
        (ended(0), ended(126), False),
    ],
)
def test_broken_is_a_validation_that_keeps_failing_for_want_of_capture(
    state: dict[str, Any] | None, last: dict[str, Any] | None, broken: bool
) -> None:
    assert World().repairs().is_broken(pod(state, last)) is broken


def test_exit_code_and_message_are_settings() -> None:
    any_code = World().repairs(repair_init_container_exit_code=0)
    assert any_code.is_broken(pod(last=ended(7)))
    said = World().repairs(repair_init_container_termination_message=" no rules ")
    assert said.is_broken(pod(last=ended(126, "no rules\n")))
    assert not said.is_broken(pod(last=ended(126, "other")))
    other = World().repairs(repair_init_container_name="check")
    assert not other.is_broken(BROKEN)


@pytest.mark.parametrize("setting", ["repair_sidecar_annotation", "repair_init_container_name"])
def test_an_empty_setting_asks_for_nothing(setting: str) -> None:
    other: dict[str, Any] = {setting: "not-there"}
    empty: dict[str, Any] = {setting: ""}
    assert not World().repairs(**other).is_broken(BROKEN)
    assert World().repairs(**empty).is_broken(BROKEN)


def test_pods_that_the_plugin_would_leave_alone_are_left_alone() -> None:
    repairs = World().repairs()
    assert not repairs.is_broken(pod(last=ended(126), annotations={}))
    assert not repairs.is_broken(pod(last=ended(126), labels={"sidecar.istio.io/inject": "false"}))


def test_one_that_is_never_started_again_is_broken_at_once() -> None:
    never = pod(ended(126))
    never = never.model_copy(update={"spec": never.spec.model_copy(update={"restart_policy": "Never"})})
    world = World()
    world.repairs(**DELETE).changed(None, never)
    assert world.asked == ["delete"]


def test_pods_of_excluded_namespaces_are_left_alone() -> None:
    repairs = World().repairs()
    repairs.skips = lambda each: skip_pod(each, "istio-system", ("default",))
    assert not repairs.is_broken(BROKEN)


DELETE: dict[str, Any] = {"repair_repair_pods": False, "repair_delete_pods": True}
LABEL: dict[str, Any] = {"repair_repair_pods": False, "repair_label_pods": True}
SELECTING: dict[str, Any] = {"repair_label_selectors": "app=web", "repair_field_selectors": "status.phase!=Running"}


@pytest.mark.parametrize(
    ("selected", "broken", "claimed"), [(True, True, True), (False, False, False), (ApiFailed("away"), False, True)]
)
def test_the_api_server_selects(selected: bool | ApiFailed, broken: bool, claimed: bool) -> None:
    """Without its answer a pod is neither acted on, nor enrolled while it may be another's case."""
    world = World(selected=selected)
    repairs = world.repairs(**DELETE, **SELECTING)
    assert repairs.is_broken(BROKEN) is broken
    assert repairs.claims(BROKEN) is claimed
    assert world.asked == ["select app=web status.phase!=Running"] * 2


def test_the_api_server_is_asked_about_broken_pods_alone() -> None:
    world = World()
    assert not world.repairs(**SELECTING).is_broken(pod())
    assert world.repairs().is_broken(BROKEN)
    assert world.asked == []


def test_selectors_without_an_api_server_are_refused() -> None:
    with pytest.raises(SidestepError, match="need an API server"):
        World().repairs(actions=False, **SELECTING)


def test_a_broken_pod_is_enrolled_where_it_runs_and_only_once() -> None:
    world = World()
    repairs = world.repairs()
    for _ in range(3):
        repairs.changed(BROKEN, BROKEN)
    assert world.adopted == 1
    assert world.counted == [("repair", "success")]
    assert world.told == [("Normal", "CaptureRepaired")]
    repairs.changed(BROKEN, None)
    repairs.changed(None, BROKEN)
    assert world.adopted == 2


def test_one_that_is_enrolled_already_only_has_to_try_again() -> None:
    world = World(enrolled=True)
    world.repairs().changed(None, BROKEN)
    assert (world.adopted, world.counted) == (0, [("repair", "skip")])


@pytest.mark.parametrize("world", [World(problem="no good"), World(found=False)])
def test_what_fails_is_tried_again_at_the_next_change(world: World) -> None:
    repairs = world.repairs()
    repairs.changed(None, BROKEN)
    repairs.changed(BROKEN, BROKEN)
    assert world.counted == [("repair", "fail")] * 2


def test_repairing_goes_before_deleting_and_that_before_labelling() -> None:
    everything = {"repair_delete_pods": True, "repair_label_pods": True}
    for settings, asked in (
        (everything, []),
        ({**everything, "repair_repair_pods": False}, ["delete"]),
        ({"repair_repair_pods": False, "repair_label_pods": True}, ["label cni.istio.io/uninitialized=true"]),
        ({"repair_repair_pods": False}, []),
        ({"repair_enabled": False, **everything}, []),
    ):
        world = World()
        world.repairs(**settings).changed(None, BROKEN)
        assert world.asked == asked


@pytest.mark.parametrize(
    ("answer", "result", "told"),
    [(True, "success", [("Warning", "DeleteBrokenPod")]), (False, "skip", []), (ApiFailed("no", 500), "fail", [])],
)
def test_the_api_servers_answer_is_counted(answer: bool | ApiFailed, result: str, told: list[tuple[str, str]]) -> None:
    world = World(answer=answer)
    world.repairs(repair_repair_pods=False, repair_delete_pods=True).changed(None, BROKEN)
    assert (world.counted, world.told) == ([("delete", result)], told)


def test_without_an_api_server_nothing_can_be_deleted() -> None:
    world = World()
    world.repairs(actions=False, repair_repair_pods=False, repair_delete_pods=True).changed(None, BROKEN)
    assert world.counted == [("delete", "fail")]


@pytest.mark.parametrize("settings", [DELETE, LABEL])
def test_one_that_is_enrolled_by_now_is_neither_deleted_nor_labelled(settings: dict[str, Any]) -> None:
    world = World(enrolled=True)
    world.repairs(**settings).changed(None, BROKEN)
    assert world.asked == []
    assert [result for _, result in world.counted] == ["skip"]


def test_one_that_istios_own_rules_capture_is_left_to_them() -> None:
    world = World(left_alone="Istio's own rules")
    world.repairs().changed(None, BROKEN)
    assert (world.counted, world.told) == ([("repair", "skip")], [])


def test_a_refusal_is_told_once() -> None:
    world = World(problem='"80-90" is not a port')
    repairs = world.repairs()
    for _ in range(3):
        repairs.changed(None, BROKEN)
    assert world.told == [("Warning", "CaptureRefused")]


@pytest.mark.parametrize(
    ("settings", "state", "claimed"),
    [
        (DELETE, None, True),
        (LABEL, ended(126), True),
        (DELETE, ended(0), False),
        (DELETE | {"repair_enabled": False}, None, False),
        (DELETE | {"repair_repair_pods": True}, None, False),
        ({}, None, False),
    ],
)
def test_a_pod_that_may_have_to_be_deleted_or_labelled_is_not_to_be_enrolled(
    settings: dict[str, Any], state: dict[str, Any] | None, claimed: bool
) -> None:
    assert World().repairs(**settings).claims(pod(state)) is claimed


def test_a_broken_pod_is_left_to_istio_cnis_agent_while_that_repairs() -> None:
    """Otherwise both would capture it."""
    world, is_there = World(), True
    repairs = world.repairs()
    repairs.gives_way = lambda: is_there
    assert repairs.claims(BROKEN) and repairs.claims(pod()) and not repairs.claims(pod(ended(0)))
    repairs.changed(None, BROKEN)
    assert (world.adopted, world.counted) == (0, [])
    is_there = False
    assert not repairs.claims(BROKEN)
    repairs.changed(BROKEN, BROKEN)
    assert (world.adopted, world.counted) == (1, [("repair", "success")])


def test_a_repair_that_fails_is_not_logged_as_one() -> None:
    with capture_logs() as logs:
        World(problem="no good").repairs().changed(None, BROKEN)
        World(found=False).repairs().changed(None, BROKEN)
    assert [(each["event"], each["error"]) for each in logs] == [
        ("repair.failed", "no good"),
        ("repair.failed", "its processes are not found"),
    ]


def test_what_the_api_server_forbids_is_known_until_the_pod_has_healed_or_gone() -> None:
    for healed in (pod(ended(0, reason="Completed")), None):
        world = World(answer=ApiFailed("no right", 403))
        repairs = world.repairs(**DELETE)
        assert repairs.why_forbidden() == ""
        repairs.changed(None, BROKEN)
        assert repairs.why_forbidden() == "default/web stays broken: no right"
        repairs.changed(BROKEN, healed)
        assert repairs.why_forbidden() == ""


def test_a_server_that_is_away_forbids_nothing() -> None:
    world = World(answer=ApiFailed("no answer", 0))
    repairs = world.repairs(**DELETE)
    repairs.changed(None, BROKEN)
    assert repairs.why_forbidden() == ""
