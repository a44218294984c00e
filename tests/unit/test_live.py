"""What becomes of annotations of running pods that change, or cannot be had, and how often that is told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from bpf.errors import KernelRefused, SidestepError, TableFull
from bpf.layout import PodEntry, PodFlags, PortRule
from cni.enrolment.enroll import Change, Enrolments
from cni.enrolment.entries import Identity
from cni.enrolment.live import LivePolicies
from cni.enrolment.terms import Terms, terms_of
from cni.policy.annotations import CapturePolicy
from cni.policy.pod import Metadata, Pod
from cni.policy.policies import Policies

TRAFFIC = "traffic.sidecar.istio"
FULL = TableFull("BPF map port_rules is full at 262144 entries; run fewer pods or use fewer rules on this node")


def pod(name: str, ports: str = "25", **more: str) -> Pod:
    annotations = {"sidestep.io/deny-outbound-ports": ports}
    annotations |= {
        f"{'sidestep' if key == 'live_policy' else TRAFFIC}.io/{key.replace('_', '-')}": more[key] for key in more
    }
    return Pod.model_validate({"metadata": {"name": name, "uid": f"uid-{name}", "annotations": annotations}})


@dataclass
class Node:
    """Pods a (1) and b (2), enrolled, on a node whose tables refuse some; a PodSource, and what was told."""

    refusing: dict[int, SidestepError] = field(default_factory=dict)
    terms: dict[int, Terms] = field(default_factory=lambda: dict.fromkeys((1, 2), terms_of(CapturePolicy())))
    live: bool = False
    ambient: frozenset[int] = frozenset()
    told: list[tuple[str, str]] = field(default_factory=list)
    pods: list[Pod] | None = field(default_factory=lambda: [pod("a"), pod("b")])

    @property
    def policies(self) -> LivePolicies:
        return LivePolicies(cast(Enrolments, self), self, Policies(live=self.live))

    @property
    def denied(self) -> dict[int, list[int]]:
        """The ports that are denied, of pods that deny any."""
        return {number: list(terms.denied) for number, terms in self.terms.items() if terms.denied}

    def identities(self) -> dict[int, Identity]:
        return {
            number: Identity(f"uid-{name}", name, "default", "c", "net", "eth0") for number, name in enumerate("ab", 1)
        }

    def entry(self, cookie: int) -> PodEntry:
        return PodEntry(flags=PodFlags.AMBIENT if cookie in self.ambient else 0)

    def change(self, cookie: int, revise: Callable[[Terms], Terms]) -> Change | None:
        if cookie in self.refusing:
            raise self.refusing[cookie]
        before, self.terms[cookie] = self.terms[cookie], revise(self.terms[cookie])
        return Change(before, self.terms[cookie]) if before != self.terms[cookie] else None

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        raise AssertionError("nobody is looked for")

    def every(self) -> list[Pod] | None:
        return self.pods

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        self.told.append((pod.name, reason))

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        self.told.append((pod.name, reason))


@pytest.mark.parametrize("error", [FULL, KernelRefused("bpf_map_update_elem: no memory")])
def test_a_refusal_is_told_and_keeps_nobody_else_from_it(error: SidestepError) -> None:
    node = Node(refusing={1: error})
    node.policies.look(node)
    assert node.told == [("a", "DenialRefused"), ("b", "DeniedPortsChanged")]
    assert node.denied == {2: [25]}


def test_pods_in_ambient_mode_follow_none_of_these_annotations() -> None:
    node = Node(ambient=frozenset((1,)))
    node.policies.look(node)
    assert node.told == [("b", "DeniedPortsChanged")]
    assert node.denied == {2: [25]}


def test_a_change_that_is_refused_is_told_too() -> None:
    node = Node(refusing={1: FULL})
    node.policies.changed(None, pod("a"))
    assert node.told == [("a", "DenialRefused")]


def test_rounds_tell_of_a_refusal_once_and_apply_it_when_there_is_room() -> None:
    node = Node(refusing={1: FULL}, pods=[pod("a")])
    policies = node.policies
    for _ in range(3):
        policies.look(node)
    assert node.told == [("a", "DenialRefused")]
    del node.refusing[1]
    for _ in range(3):
        policies.look(node)
    assert node.told == [("a", "DenialRefused"), ("a", "DeniedPortsChanged")]
    node.refusing[1] = FULL
    policies.look(node)
    assert [reason for _, reason in node.told].count("DenialRefused") == 2


def test_an_owner_who_tries_something_else_is_told_again() -> None:
    node = Node(refusing={1: FULL})
    policies = node.policies
    policies.changed(None, pod("a"))
    policies.changed(pod("a"), pod("a", "26"))
    assert node.told == [("a", "DenialRefused")] * 2


def test_pods_that_are_gone_are_not_remembered() -> None:
    node = Node(refusing={1: FULL})
    policies = node.policies
    policies.changed(None, pod("a"))
    policies.changed(pod("a"), None)
    assert policies._refused == {}


@pytest.mark.parametrize("pods", [None, []])
def test_while_no_pods_are_known_nothing_changes(pods: Any) -> None:
    node = Node(pods=pods)
    node.policies.look(node)
    assert (node.denied, node.told) == ({}, [])


def live(**more: str) -> Pod:
    return pod("a", "", live_policy="true", **more)


def test_a_pod_that_asks_for_it_follows_ports_and_ranges() -> None:
    node = Node()
    node.policies.changed(None, live(excludeOutboundPorts="80", includeOutboundIPRanges="10.0.0.0/8"))
    assert node.terms[1].port_rules[80] == PortRule.EXCLUDE_OUTBOUND
    assert list(map(str, node.terms[1].networks)) == ["10.0.0.0/8"]
    assert PodFlags.OUTBOUND_ALL not in node.terms[1].flags
    assert node.told == [("a", "LivePolicyChanged")]


@pytest.mark.parametrize(("on_node", "in_pod"), [(False, None), (False, "false"), (True, "false")])
def test_a_pod_that_does_not_follows_denied_ports_alone(on_node: bool, in_pod: str | None) -> None:
    node, said = Node(live=on_node), {} if in_pod is None else {"live_policy": in_pod}
    node.policies.changed(None, pod("a", "25", excludeOutboundPorts="80", **said))
    assert (80 in node.terms[1].port_rules, node.denied) == (False, {1: [25]})


def test_the_node_says_it_for_pods_that_say_nothing() -> None:
    node = Node(live=True)
    node.policies.changed(None, pod("a", excludeOutboundPorts="80"))
    assert 80 in node.terms[1].port_rules
    assert node.told == [("a", "DeniedPortsChanged"), ("a", "LivePolicyChanged")]


def test_a_refused_value_leaves_the_old_policy_whole_and_is_told_once() -> None:
    node = Node()
    policies = node.policies
    policies.changed(None, good := live(excludeOutboundPorts="80"))
    before = node.terms[1]
    policies.changed(good, bad := live(excludeOutboundPorts="81,many", includeOutboundPorts="82"))
    node.pods = [bad]
    policies.look(node)
    assert node.terms[1] == before
    assert node.told == [("a", "LivePolicyChanged"), ("a", "LivePolicyRefused")]


def test_what_a_pod_denies_changes_although_what_it_captures_is_refused() -> None:
    node = Node(live=True)
    node.policies.changed(None, pod("a", "25", excludeOutboundPorts="many"))
    assert node.denied == {1: [25]}
    assert node.told == [("a", "DeniedPortsChanged"), ("a", "LivePolicyRefused")]


def test_what_a_pod_captures_changes_although_what_it_denies_is_refused() -> None:
    node = Node(live=True)
    policies = node.policies
    policies.changed(None, first := pod("a", "25"))
    policies.changed(first, pod("a", "many", excludeOutboundPorts="80"))
    assert (80 in node.terms[1].port_rules, node.denied) == (True, {1: [25]})


def test_a_pod_that_follows_no_more_keeps_what_it_has() -> None:
    node = Node()
    policies = node.policies
    policies.changed(None, first := live(excludeOutboundPorts="80"))
    policies.changed(first, pod("a", "", live_policy="false", excludeOutboundPorts="81"))
    assert 80 in node.terms[1].port_rules and 81 not in node.terms[1].port_rules
    assert PodFlags.LIVE_POLICY not in node.terms[1].flags


def test_only_pods_with_late_outbound_are_told_of_their_deletion() -> None:
    node = Node()
    late = pod("a", "").model_copy(update={"metadata": _deleted("a", {"sidestep.io/late-outbound": "allow"})})
    other = pod("b", "").model_copy(update={"metadata": _deleted("b", {})})
    for each in (late, other):
        node.policies.changed(pod(each.name, ""), each)
    assert [PodFlags.DELETED in node.terms[number].flags for number in (1, 2)] == [True, False]
    assert node.told == []


def test_a_policy_that_changes_while_the_pod_is_deleted_changes_nothing_about_that() -> None:
    node = Node(live=True)
    late = {"sidestep.io/late-outbound": "allow"}
    deleted = pod("a", "").model_copy(update={"metadata": _deleted("a", late)})
    more = {**late, f"{TRAFFIC}.io/excludeOutboundPorts": "80"}
    node.policies.changed(None, deleted)
    node.policies.changed(deleted, deleted.model_copy(update={"metadata": _deleted("a", more)}))
    assert PodFlags.DELETED in node.terms[1].flags and 80 in node.terms[1].port_rules


def _deleted(name: str, annotations: dict[str, str]) -> Metadata:
    said = {"name": name, "uid": f"uid-{name}", "annotations": annotations}
    return Metadata.model_validate(said | {"deletionTimestamp": "2026-01-01T00:00:00Z"})
