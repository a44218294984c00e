"""The annotations of ambient Pods."""

import pytest
from structlog.testing import capture_logs

from cni.errors import InvalidAnnotation
from cni.policy.ambient_annotations import BYPASS_INBOUND, DNS_CAPTURE, ambient_policy_of
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.pod import Pod

NODE = AmbientPolicy(dns_capture=True, ipv6=False)


def pod(**annotations: str) -> Pod:
    return Pod.model_validate({"metadata": {"name": "app", "annotations": annotations}})


def test_a_pod_without_annotations_has_the_nodes_defaults() -> None:
    assert ambient_policy_of(pod(), NODE) == NODE


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("1", True), ("T", True), ("TRUE", True), ("false", False), ("0", False), ("F", False)],
)
def test_booleans_are_those_of_go(text: str, expected: bool) -> None:
    assert ambient_policy_of(pod(**{BYPASS_INBOUND: text}), NODE).bypass_inbound_capture is expected
    assert ambient_policy_of(pod(**{DNS_CAPTURE: text}), NODE).dns_capture is expected


@pytest.mark.parametrize("text", ["", "yes", "tRUE", " true", "on"])
def test_what_is_no_boolean_counts_as_absent_and_is_logged(text: str) -> None:
    with capture_logs() as logs:
        assert ambient_policy_of(pod(**{BYPASS_INBOUND: text}), NODE) == NODE
    assert [(each["event"], each["log_level"]) for each in logs] == [("annotation.ignored", "warning")]
    assert f'{BYPASS_INBOUND}: "{text}" is not a boolean' in logs[0]["problem"]


def test_packets_of_virtual_machines_are_refused_as_sockets_cannot_have_them() -> None:
    with pytest.raises(InvalidAnnotation, match="sidestep captures sockets"):
        ambient_policy_of(pod(**{"istio.io/reroute-virtual-interfaces": "tap0"}), NODE)


@pytest.mark.parametrize("text", ["", " ", " , "])
def test_a_list_without_interfaces_asks_for_nothing(text: str) -> None:
    assert ambient_policy_of(pod(**{"istio.io/reroute-virtual-interfaces": text}), NODE) == NODE
