"""Pods with ten thousand ranges or ports: everything they say is obeyed, and all of it leaves with them.

How long that takes is for `make bench-connect` to print.
"""

from collections.abc import Iterable, Iterator

import pytest

from cni.policy import annotations
from cni.policy.annotations import CapturePolicy, policy_of
from cni.policy.pod import Pod
from tests.datapath.wires import Wire, ip_command

MANY = 10_000
HALF = MANY // 2


def spaced(first4: int, first6: int) -> list[str]:
    """Ten thousand /24 and /64 with gaps as large between them."""
    numbers = range(0, 2 * HALF, 2)
    return [f"{first4}.{n >> 8}.{n & 255}.0/24" for n in numbers] + [f"fd{first6}:{n:x}::/64" for n in numbers]


INCLUDED = spaced(11, 11)
EXCLUDED = [each.replace(".0/24", ".128/25").replace("::/64", ":0:0:8000::/65") for each in INCLUDED]


def policy(**values: Iterable[object]) -> CapturePolicy:
    """What a Pod with those annotations asks for, taken from the manifest as in ADD."""
    proxy = {"name": "istio-proxy", "env": [{"name": "ISTIO_DUAL_STACK", "value": "true"}]}
    texts = {getattr(annotations, name): ",".join(map(str, each)) for name, each in values.items()}
    manifest = {"metadata": {"name": "pod", "annotations": texts}, "spec": {"containers": [proxy]}}
    return policy_of(Pod.model_validate(manifest))


@pytest.fixture
def wide(wire: Wire) -> Iterator[Wire]:
    """The peer answers for 11.0.0.0/8 and fd11::/16."""
    pod, peer = wire.pod.path.name, wire.peer.path.name
    ip_command("-n", pod, "route", "add", "11.0.0.0/8", "via", wire.peer.ip4)
    ip_command("-n", pod, "route", "add", "fd11::/16", "via", wire.peer.ip6)
    for network in ("11.0.0.0/8", "fd11::/16"):
        ip_command("-n", peer, "route", "add", "local", network, "dev", "lo")
    before = wire.kernel.entries()
    yield wire
    wire.pod.stop()
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    after = wire.kernel.entries()
    assert {**after, "listeners": 0, "handshakes": 0} == {**before, "listeners": 0, "handshakes": 0}


def who(wire: Wire, host: str, port: int = 8080) -> object:
    seen = wire.pod.dial(host, port)
    return seen.get("who", seen)


def test_ten_thousand_included_and_excluded_ranges_are_told_apart(wide: Wire) -> None:
    wide.mesh(policy(INCLUDE_OUTBOUND_RANGES=INCLUDED, EXCLUDE_OUTBOUND_RANGES=EXCLUDED))
    assert wide.kernel.entries()["networks"] == 2 * MANY
    for n in (0, HALF, 2 * HALF - 2):
        assert who(wide, f"11.{n >> 8}.{n & 255}.1") == "outbound"
        assert who(wide, f"11.{n >> 8}.{n & 255}.127") == "outbound"
        assert who(wide, f"11.{n >> 8}.{n & 255}.128") == "remote"
        assert who(wide, f"11.{n >> 8}.{(n & 255) + 1}.1") == "remote"
        assert who(wide, f"fd11:{n:x}::1") == "outbound"
        assert who(wide, f"fd11:{n:x}:0:0:7fff::1") == "outbound"
        assert who(wide, f"fd11:{n:x}:0:0:8000::1") == "remote"
        assert who(wide, f"fd11:{n + 1:x}::1") == "remote"


def test_ten_thousand_excluded_ranges_leave_the_rest_captured(wide: Wire) -> None:
    wide.mesh(policy(EXCLUDE_OUTBOUND_RANGES=INCLUDED))
    assert wide.kernel.entries()["networks"] == MANY
    for n in (0, HALF, 2 * HALF - 2):
        assert who(wide, f"11.{n >> 8}.{n & 255}.255") == "remote"
        assert who(wide, f"11.{n >> 8}.{(n & 255) + 1}.0") == "outbound"
        assert who(wide, f"fd11:{n:x}::1") == "remote"
        assert who(wide, f"fd11:{n + 1:x}::1") == "outbound"


def test_ten_thousand_ports_are_told_apart_both_ways(wide: Wire) -> None:
    ports = [*range(1, MANY), 9090]
    assert {8080, 9090} <= set(ports)
    wide.mesh(policy(EXCLUDE_OUTBOUND_PORTS=ports[:8000], INCLUDE_INBOUND_PORTS=ports))
    assert wide.kernel.entries()["port_rules"] == len(set(ports))
    wide.pod.serve("app", "9090", "15000")
    wide.peer.serve("remote", "7999")
    assert (who(wide, "11.0.0.1", 7999), who(wide, "11.0.0.1", 8080)) == ("remote", "outbound")
    for port, expected in ((8080, "inbound"), (9090, "inbound"), (15000, "app")):
        for ip in (wide.pod.ip4, wide.pod.ip6):
            assert wide.peer.dial(ip, port, uid=0)["who"] == expected


def test_every_port_can_be_excluded(wide: Wire) -> None:
    wide.mesh(policy(EXCLUDE_OUTBOUND_PORTS=range(65536)))
    assert [who(wide, "11.0.0.1", port) for port in (8080, 9090, 15020)] == ["remote"] * 3
    assert wide.kernel.entries()["port_rules"] == 65536


def test_a_pod_that_asks_for_less_than_before_leaves_nothing_of_it(wide: Wire) -> None:
    wide.mesh(policy(EXCLUDE_OUTBOUND_RANGES=INCLUDED, EXCLUDE_OUTBOUND_PORTS=range(MANY)))
    assert who(wide, "11.0.0.1") == "remote"
    entries = wide.enrol(policy(EXCLUDE_OUTBOUND_RANGES=["11.0.0.0/24"]))
    assert who(wide, "11.0.0.1") == "remote"
    assert who(wide, "11.0.2.1") == "outbound"
    held = wide.kernel.entries()
    assert (held["networks"], held["port_rules"]) == (1, len(entries.terms.port_rules))
