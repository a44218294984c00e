"""Misspelt annotations: which are told, and what is taken to be meant."""

import pytest

from cni.policy.annotations import CapturePolicy
from cni.policy.spelling import misspelt
from installer.commands.pods.policy_words import annotations_of


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("traffic.sidecar.istio.io/includeOutboundIPRange", "includeOutboundIPRanges"),
        ("traffic.sidecar.istio.io/excludeoutboundports", "excludeOutboundPorts"),
        ("traffic.istio.io/excludeInboundPorts", "traffic.sidecar.istio.io/excludeInboundPorts"),
        ("sidecar.istio.io/includeOutboundIPRanges", "traffic.sidecar.istio.io/includeOutboundIPRanges"),
        ("sidecar.istio.io/interceptMode", "interceptionMode"),
        ("sidecar.istio.io/Inject", "inject"),
        ("sidestep.io/deny-outbound-port", "deny-outbound-ports"),
    ],
)
def test_what_was_meant_is_told(name: str, meant: str) -> None:
    (found,) = misspelt([name])
    assert str(found) == f"unknown annotation {name}, did you mean {meant}"


@pytest.mark.parametrize("name", ["traffic.sidecar.istio.io/foo", "sidestep.io/strict"])
def test_what_looks_like_nothing_is_unknown_all_the_same(name: str) -> None:
    assert [str(each) for each in misspelt([name])] == [f"unknown annotation {name}"]


@pytest.mark.parametrize(
    "name",
    [
        *annotations_of(CapturePolicy()),
        "sidecar.istio.io/status",
        "sidecar.istio.io/proxyCPULimit",
        "sidecar.istio.io/of-a-later-istio",
        "status.sidecar.istio.io/port",
        "traffic.istio.io/nodeSelector",
        "proxy.istio.io/config",
        "istio.io/rev",
        "prometheus.io/scrape",
        "example.com/includeOutboundIPRange",
        "inject",
    ],
)
def test_the_annotations_of_others_are_none_of_our_business(name: str) -> None:
    assert list(misspelt([name])) == []
