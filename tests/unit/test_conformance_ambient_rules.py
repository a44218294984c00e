"""The oracle's rules for pods in ambient mode are Istio's, in Istio's order."""

import re

import pytest

from cni.policy.ambient_policy import AmbientPolicy
from tests.conformance.ambient.configs import CONFIGS
from tests.conformance.ambient.kinds import probes_of
from tests.conformance.ambient.rules import ambient_restore_text
from tests.conformance.configs import AmbientConfig

LOOPBACK = {4: "127.0.0.1/32", 6: "::1/128"}
PROBES = {4: "169.254.7.127/32", 6: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}


def chain(policy: AmbientPolicy, name: str, table: str = "nat", version: int = 4) -> list[str]:
    part = re.search(rf"\*{table}\n(.*?)COMMIT", ambient_restore_text(policy, version), re.S)
    lines = part[1].splitlines() if part else []
    return [line.removeprefix(f"-A {name} ") for line in lines if line.startswith(f"-A {name} ")]


@pytest.mark.parametrize("version", [4, 6])
def test_outbound_without_dns_capture(version: int) -> None:
    assert chain(AmbientPolicy(), "ISTIO_OUTPUT", version=version) == [
        f"-d {PROBES[version]} -p tcp -m tcp -j ACCEPT",
        "-p tcp -m mark --mark 0x111/0xfff -j ACCEPT",
        f"! -d {LOOPBACK[version]} -o lo -j ACCEPT",
        f"! -d {LOOPBACK[version]} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001",
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_dns_capture_comes_before_what_stays_in_the_pod(version: int) -> None:
    rules = chain(AmbientPolicy(dns_capture=True), "ISTIO_OUTPUT", version=version)
    assert rules[1:3] == [
        "! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-ports 15053",
        f"! -d {LOOPBACK[version]} -p tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053",
    ]
    assert len(rules) == 6
    zones = [chain(AmbientPolicy(dns_capture=True), name, "raw", version) for name in ("ISTIO_OUTPUT", "ISTIO_PRERT")]
    assert zones == [
        ["-p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1"],
        ["-p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1"],
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_inbound(version: int) -> None:
    capture = "-p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006"
    assert chain(AmbientPolicy(), "ISTIO_PRERT", version=version) == [
        f"-s {PROBES[version]} -p tcp -m tcp -j ACCEPT",
        f"! -d {LOOPBACK[version]} {capture}",
    ]
    assert chain(AmbientPolicy(bypass_inbound_capture=True), "ISTIO_PRERT", version=version) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_answers_are_marked_in_every_mode(config: AmbientConfig) -> None:
    assert chain(config.policy, "ISTIO_PRERT", "mangle") == [
        "-m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff"
    ]
    assert chain(config.policy, "ISTIO_OUTPUT", "mangle") == [
        "-m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
    ]
    hooks = ["-j ISTIO_PRERT"], ["-j ISTIO_OUTPUT"]
    for table in ("nat", "mangle", *(["raw"] if config.policy.dns_capture else [])):
        assert (chain(config.policy, "PREROUTING", table), chain(config.policy, "OUTPUT", table)) == hooks


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_no_two_probes_of_a_configuration_are_the_same(config: AmbientConfig) -> None:
    probes = probes_of(config)
    assert len({probe.name for probe in probes}) == len(probes)
