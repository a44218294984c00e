"""What becomes of denied ports that cannot be had, and how often that is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from bpf.errors import KernelRefused, SidestepError, TableFull
from bpf.layout import PortRule
from cni.enrolment.denial import Denials
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity
from cni.policy.pod import Pod

FULL = TableFull("BPF map port_rules is full at 262144 entries; run fewer pods or use fewer rules on this node")


def pod(name: str, ports: str = "25") -> Pod:
    annotations = {"sidestep.io/deny-outbound-ports": ports}
    return Pod.model_validate({"metadata": {"name": name, "uid": f"uid-{name}", "annotations": annotations}})


@dataclass
class Node:
    """Pods a (1) and b (2), enrolled, on a node whose tables refuse some; a PodSource, and what was told."""

    refusing: dict[int, SidestepError] = field(default_factory=dict)
    denied: dict[int, list[int]] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    pods: list[Pod] | None = field(default_factory=lambda: [pod("a"), pod("b")])

    @property
    def denials(self) -> Denials:
        return Denials(cast(Enrolments, self), self)

    def identities(self) -> dict[int, Identity]:
        return {
            number: Identity(f"uid-{name}", name, "default", "c", "net", "eth0") for number, name in enumerate("ab", 1)
        }

    def deny(self, cookie: int, denied: Mapping[int, PortRule]) -> bool:
        if cookie in self.refusing:
            raise self.refusing[cookie]
        before, self.denied[cookie] = self.denied.get(cookie, []), list(denied)
        return before != self.denied[cookie]

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
    node.denials.look(node)
    assert node.told == [("a", "DenialRefused"), ("b", "DeniedPortsChanged")]
    assert node.denied == {2: [25]}


def test_a_change_that_is_refused_is_told_too() -> None:
    node = Node(refusing={1: FULL})
    node.denials.changed(None, pod("a"))
    assert node.told == [("a", "DenialRefused")]


def test_rounds_tell_of_a_refusal_once_and_apply_it_when_there_is_room() -> None:
    node = Node(refusing={1: FULL}, pods=[pod("a")])
    denials = node.denials
    for _ in range(3):
        denials.look(node)
    assert node.told == [("a", "DenialRefused")]
    del node.refusing[1]
    for _ in range(3):
        denials.look(node)
    assert node.told == [("a", "DenialRefused"), ("a", "DeniedPortsChanged")]
    node.refusing[1] = FULL
    denials.look(node)
    assert [reason for _, reason in node.told].count("DenialRefused") == 2


def test_an_owner_who_tries_something_else_is_told_again() -> None:
    node = Node(refusing={1: FULL})
    denials = node.denials
    denials.changed(None, pod("a"))
    denials.changed(pod("a"), pod("a", "26"))
    assert node.told == [("a", "DenialRefused")] * 2


def test_pods_that_are_gone_are_not_remembered() -> None:
    node = Node(refusing={1: FULL})
    denials = node.denials
    denials.changed(None, pod("a"))
    denials.changed(pod("a"), None)
    assert denials._refused == {}


@pytest.mark.parametrize("pods", [None, []])
def test_while_no_pods_are_known_nothing_changes(pods: Any) -> None:
    node = Node(pods=pods)
    node.denials.look(node)
    assert (node.denied, node.told) == ({}, [])
