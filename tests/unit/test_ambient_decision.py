"""The decision for pods in ambient mode, by examples: one for each row of the tables in docs/semantics.md."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from cni.policy.ambient_decision import inbound, outbound
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.decision import Container, Inbound, Outbound, Verdict

OWN = frozenset(map(ip_address, ("10.9.0.2", "fd99::2")))
DNS = AmbientPolicy(dns_capture=True)
INGRESS = AmbientPolicy(bypass_inbound_capture=True)
TRUSTING = AmbientPolicy(trust_mark=True)


def out(
    to: str, port: int, policy: AmbientPolicy = DNS, mark: int = 0, container: Container = "other", udp: bool = False
) -> Verdict:
    """What becomes of a connection of somebody in the pod, or of ztunnel's if `container` is trusted."""
    asked = Outbound(ip_address(to), port, own_addresses=OWN, mark=mark, container=container)
    return outbound(policy, replace(asked, protocol="udp") if udp else asked)


@pytest.mark.parametrize("there", ["203.0.113.7", "2001:db8::7", "::ffff:203.0.113.7"])
def test_what_leaves_the_pod_goes_to_ztunnel(there: str) -> None:
    assert out(there, 80) == Verdict("proxy-outbound", "A6")
    assert out(there, 80, udp=True) == Verdict("pass", "A7")
    assert out(there, 53) == Verdict("dns", "A3")
    assert out(there, 53, udp=True) == Verdict("dns", "A2")
    assert out(there, 53, AmbientPolicy()) == Verdict("proxy-outbound", "A6")
    assert out(there, 53, AmbientPolicy(), udp=True) == Verdict("pass", "A7")


@pytest.mark.parametrize(("own", "lo"), [("10.9.0.2", "127.0.0.1"), ("fd99::2", "::1")])
def test_what_stays_in_the_pod_is_direct_but_for_dns_over_tcp(own: str, lo: str) -> None:
    assert out(own, 80) == Verdict("pass", "A5")
    assert out(lo, 80) == Verdict("pass", "A7")
    assert out(own, 53) == Verdict("dns", "A3")
    assert out(own, 53, udp=True) == Verdict("pass", "A5")
    assert out(lo, 53) == out(lo, 53, udp=True) == Verdict("pass", "A7")
    assert out("127.0.0.53", 53) == Verdict("dns", "A3")


def test_ztunnels_own_sockets_pass() -> None:
    for port in (53, 80, 15008):
        assert out("203.0.113.7", port, mark=0x539, container="trusted") == Verdict("pass", "A7")
    assert out("203.0.113.7", 53, mark=0x539, container="trusted", udp=True) == Verdict("pass", "A7")
    assert out("203.0.113.7", 80, mark=0x111, container="trusted") == Verdict("pass", "A4")
    assert out("203.0.113.7", 80, mark=0xABC539, container="trusted") == Verdict("pass", "A7")  # 12 bits count


@pytest.mark.parametrize("mark", [0x539, 0x111])
def test_the_mark_alone_does_not_lead_past_ztunnel(mark: int) -> None:
    assert out("203.0.113.7", 80, mark=mark) == Verdict("proxy-outbound", "A6")
    assert out("203.0.113.7", 53, mark=mark) == Verdict("dns", "A3")
    assert out("203.0.113.7", 80, TRUSTING, mark=mark).action == "pass"


def test_the_mark_alone_is_refused_while_no_ztunnel_is_known() -> None:
    assert out("203.0.113.7", 80, mark=0x539, container="unknown") == Verdict("refuse", "A7")
    assert out("203.0.113.7", 80, container="unknown") == Verdict("proxy-outbound", "A6")
    assert out("10.9.0.2", 80, mark=0x539, container="unknown") == Verdict("pass", "A5")


def test_ipv6_is_left_alone_when_it_is_switched_off() -> None:
    assert out("2001:db8::7", 80, AmbientPolicy(ipv6=False)) == Verdict("pass", "no IPv6")
    assert out("203.0.113.7", 80, AmbientPolicy(ipv6=False)) == Verdict("proxy-outbound", "A6")


def test_inbound_plaintext_goes_to_ztunnel_and_hbone_is_ztunnels_anyway() -> None:
    peer = ip_address("203.0.113.7")
    assert inbound(DNS, Inbound(80, peer, OWN)) == Verdict("proxy-inbound", "B2")
    assert inbound(DNS, Inbound(15008, peer, OWN)) == Verdict("pass", "B3")
    assert inbound(DNS, Inbound(15020, peer, OWN)) == Verdict("proxy-inbound", "B2")
    assert inbound(INGRESS, Inbound(80, peer, OWN)) == Verdict("pass", "B3")
    assert inbound(DNS, Inbound(80, ip_address("10.9.0.2"), OWN)) == Verdict("pass", "self")
    assert inbound(DNS, Inbound(80, peer, OWN, protocol="udp")) == Verdict("pass", "UDP")
    assert inbound(AmbientPolicy(ipv6=False), Inbound(80, ip_address("2001:db8::7"), OWN)).rule == "no IPv6"
