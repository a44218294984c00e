"""The oracle's rules are Istio's, in Istio's order: the parts in which order or wording matters."""

import re

import pytest

from cni.policy.annotations import CapturePolicy
from tests.conformance.configs import CONFIGS
from tests.conformance.kinds import probes_of
from tests.conformance.rules import restore_text


def chain(policy: CapturePolicy, name: str, table: str = "nat", version: int = 4) -> list[str]:
    text = restore_text(policy, version)
    part = re.search(rf"\*{table}\n(.*?)COMMIT", text, re.S)
    return (
        [line.removeprefix(f"-A {name} ") for line in part[1].splitlines() if line.startswith(f"-A {name} ")]
        if part
        else []
    )


def test_outbound_of_a_pod_without_annotations() -> None:
    assert chain(CapturePolicy(), "ISTIO_OUTPUT") == [
        "-p tcp --dport 15020 -j RETURN",
        "-p udp --dport 15020 -j RETURN",
        "-o lo -s 127.0.0.6/32 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-o lo -m owner ! --uid-owner 1337 -j RETURN",
        "-m owner --uid-owner 1337 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-o lo -m owner ! --gid-owner 1337 -j RETURN",
        "-m owner --gid-owner 1337 -j RETURN",
        "-d 127.0.0.1/32 -j RETURN",
        "-j ISTIO_REDIRECT",
    ]


def test_inbound_of_a_pod_without_annotations() -> None:
    assert chain(CapturePolicy(), "ISTIO_INBOUND") == [
        "-p tcp --dport 15008 -j RETURN",
        "-p tcp --dport 15020 -j RETURN",
        "-p tcp --dport 15021 -j RETURN",
        "-p tcp --dport 15090 -j RETURN",
        "-p tcp -j ISTIO_IN_REDIRECT",
    ]


def test_dns_capture() -> None:
    rules = chain(CapturePolicy(dns_capture=True), "ISTIO_OUTPUT")
    assert (
        "-o lo ! -d 127.0.0.1/32 -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT"
        in rules
    )
    assert "-o lo -p tcp ! --dport 53 -m owner ! --uid-owner 1337 -j RETURN" in rules
    assert rules.index("-j ISTIO_OUTPUT_DNS") == rules.index("-m owner --gid-owner 1337 -j RETURN") + 1
    assert chain(CapturePolicy(dns_capture=True), "ISTIO_OUTPUT_DNS", "raw")[-1] == "-p udp --dport 53 -j CT --zone 2"


def test_an_included_loopback_range_takes_the_rules_for_self_calls_of_applications_out() -> None:
    assert not [
        rule for rule in chain(CapturePolicy(loopback_included=True), "ISTIO_OUTPUT") if "! --uid-owner" in rule
    ]


def test_excluded_interfaces_come_first() -> None:
    policy = CapturePolicy(exclude_interfaces=("eth1",), mode="TPROXY")
    for table in ("nat", "mangle"):
        assert chain(policy, "OUTPUT", table)[0] == "-o eth1 -j RETURN"
        assert chain(policy, "PREROUTING", table)[0] == "-i eth1 -j RETURN"


def test_tproxy() -> None:
    assert chain(CapturePolicy(mode="TPROXY"), "ISTIO_INBOUND", "mangle", 6) == [
        "-p tcp -m mark --mark 1337 -j RETURN",
        "-p tcp -s ::6/128 -i lo -j RETURN",
        "-p tcp -i lo -m mark ! --mark 1338 -j RETURN",
        "-p tcp --dport 15020 -j RETURN",
        "-p tcp --dport 15021 -j RETURN",
        "-p tcp --dport 15090 -j RETURN",
        "-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT",
        "-p tcp -j ISTIO_TPROXY",
    ]
    assert not chain(CapturePolicy(mode="TPROXY"), "PREROUTING")


def test_without_inbound_capture_nothing_jumps_to_its_chain() -> None:
    for mode in ("REDIRECT", "TPROXY"):
        policy = CapturePolicy(inbound_all=False, mode=mode)
        assert not chain(policy, "PREROUTING")
        assert not chain(policy, "ISTIO_INBOUND", "mangle")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_no_two_probes_of_a_configuration_are_the_same(config: object) -> None:
    probes = probes_of(config)  # type: ignore[arg-type]
    assert len({probe.name for probe in probes}) == len(probes)
