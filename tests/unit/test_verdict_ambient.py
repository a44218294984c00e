"""The verdict on ambient mode: one fault if ztunnel is away, a reason for each pending pod, unknown never well."""

from typing import Any

import pytest

from installer.verdict.node import verdict_on
from installer.verdict.verdict import State, Verdict
from tests.unit.test_verdict import AWAY, node, pod

NOBODY = "no ztunnel is connected to /run/z.sock"


def ambient_pod(name: str, state: str = "ambient") -> dict[str, Any]:
    """An enrolled pod in ambient mode."""
    proxy = {"state": "listens" if state == "ambient" else "absent", "words": ""}
    return pod(pod=f"default/{name}", uid=name, is_ambient=True, state=state, proxy=proxy)


def row(name: str, state: str = "ambient", reason: str = "") -> dict[str, str]:
    """As the agent tells of it."""
    return {"pod": f"default/{name}", "uid": name, "state": state, "reason": reason}


def verdict(pods: list[dict[str, Any]], rows: list[dict[str, str]], problem: str = "", **changes: Any) -> Verdict:
    ambient = {"is_on": True, "is_expected": True, "ztunnels": 0 if problem else 1, "problem": problem, "pods": rows}
    return verdict_on(node(pods=pods, ambient=ambient, **changes))


def test_pods_that_ztunnel_has_are_well_and_count_as_captured() -> None:
    found = verdict([ambient_pod("a"), pod()], [row("a")])
    assert (found.state, found.findings, found.headline) == (State.OK, (), "OK: 2 pods are captured, nothing is wrong")


def test_a_ztunnel_that_is_away_is_one_fault_with_one_advice_however_many_pods_wait() -> None:
    pods = [ambient_pod(name, "pending") for name in "ab"]
    rows = [row(name, "pending", NOBODY) for name in "abc"]
    found = verdict(pods, rows, NOBODY)
    (only,) = found.findings
    assert (only.state, only.part) == (State.WRONG, "ambient")
    assert only.what == f"{NOBODY}; pending: default/a, default/b, default/c"
    assert "ztunnel's pod runs on this node" in only.advice


def test_a_ztunnel_that_is_away_is_wrong_before_any_pod_waits_for_it() -> None:
    (only,) = verdict([], [], NOBODY).findings
    assert only.what == f"{NOBODY}; pending: no pod yet, but new ones wait"


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("ztunnel has not answered within 5 s", "log of this node's ztunnel"),
        ("ztunnel refuses: failure to start proxy: in use", "ports 15001, 15006, 15008 and 15053"),
        ("its processes are not found on this node", "--proc"),
        ("PATCH /x: 403 forbidden", "patch pods/status"),
        ("istio-cni's netfilter rules are in the pod's network namespace already", "create the pod anew"),
        ("something nobody thought of", "see to the reason"),
    ],
)
def test_a_pending_pod_is_wrong_with_its_reason_and_what_to_do(reason: str, advice: str) -> None:
    (only,) = verdict([], [row("a", "pending", reason)]).findings
    assert (only.state, only.what) == (State.WRONG, f"pending: {reason}: default/a")
    assert advice in only.advice


def test_pods_with_the_same_reason_share_a_line_and_ztunnels_absence_hides_no_other_reason() -> None:
    forbidden = "PATCH /x: 403 forbidden"
    rows = [row("a", "pending", NOBODY), row("b", "ambient", forbidden), row("c", "ambient", forbidden)]
    found = verdict([], rows, NOBODY)
    assert [each.what for each in found.findings] == [
        f"{NOBODY}; pending: default/a",
        f"ambient: {forbidden}: default/b, default/c",
    ]


def test_a_pod_that_ztunnel_has_accepted_and_does_not_listen_in_is_wrong() -> None:
    (only,) = verdict([ambient_pod("a", "pending")], [row("a")]).findings
    assert only.what.startswith("pending: ztunnel does not listen in them") and "log of this node" in only.advice


def test_without_an_answer_about_ambient_mode_a_node_that_has_it_is_unknown_and_others_are_well() -> None:
    unknown = {"is_on": None, "unknown": "command: unexpected value"}
    found = verdict_on(node(ambient={**unknown, "is_expected": True}))
    assert (found.state, found.exit_status) == (State.UNKNOWN, 3)
    assert verdict_on(node(ambient=unknown)).state is State.OK


def test_an_agent_that_is_away_is_one_fault_and_pods_without_ztunnel_are_still_told() -> None:
    unknown = {"is_on": None, "unknown": "nobody is there", "is_expected": True}
    (only,) = verdict_on(node(agent=AWAY, pods=[ambient_pod("a")], ambient=unknown)).findings
    assert (only.state, only.part) == (State.WRONG, "agent")
    found = verdict_on(node(agent=AWAY, pods=[ambient_pod("a", "pending")], ambient=unknown))
    assert [each.part for each in found.findings] == ["agent", "ambient"]


def test_ambient_mode_that_was_switched_off_under_its_pods_is_wrong() -> None:
    (only,) = verdict_on(node(pods=[ambient_pod("a")])).findings
    assert only.what == "it is off, and nobody hands these pods to a new ztunnel: default/a"
