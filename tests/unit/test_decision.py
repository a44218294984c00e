"""The reference decision against the table of connections in docs/semantics.md, one row a test case."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.policy.annotations import CapturePolicy
from cni.policy.decision import Action, Inbound, Outbound, Verdict, inbound, outbound

PASS: Action = "pass"
E1: Action = "proxy-outbound"
E6: Action = "proxy-inbound"
RESOLVER: Action = "dns"
DEFAULT = CapturePolicy()
# the pod of all these tests: two interfaces with two families, and the ::6 that Istio puts on its loopback
OWN = frozenset(map(ip_address, ("10.0.0.5", "10.9.0.5", "2001:db8::5", "::6")))
REMOTE = "203.0.113.7"


def connection(
    destination: str, port: int = 80, *, source: str | None = None, uid: int = 1000, gid: int = 1000
) -> Outbound:
    return Outbound(ip_address(destination), port, ip_address(source) if source else None, uid, gid, OWN)


def from_proxy(destination: str, port: int = 80, source: str | None = None) -> Outbound:
    return connection(destination, port, source=source, uid=1337, gid=1337)


def arriving(port: int, source: str = REMOTE) -> Inbound:
    return Inbound(port, ip_address(source), OWN)


def ranges(include: str | None = None, exclude: str = "", **others: object) -> CapturePolicy:
    included = tuple(map(ip_network, (include or "").split()))
    return CapturePolicy.model_validate(
        {
            "outbound_all": include is None,
            "include_outbound": included,
            "exclude_outbound": tuple(map(ip_network, exclude.split())),
            "loopback_included": any(network.network_address.is_loopback for network in included),
            **others,
        }
    )


@pytest.mark.parametrize(
    ("conn", "action", "rule"),
    [
        pytest.param(connection(REMOTE), E1, "O10", id="out.app.http"),
        pytest.param(connection(REMOTE, 443), E1, "O10", id="out.app.https"),
        pytest.param(connection(REMOTE, 22), E1, "O10", id="out.app.ssh"),
        pytest.param(connection(REMOTE, 53), E1, "O10", id="dns.tcp.app"),
        pytest.param(connection(REMOTE, uid=0, gid=0), E1, "O10", id="out.root.http"),
        pytest.param(connection(REMOTE, 15001), E1, "O10", id="out.app.15001"),
        pytest.param(connection(REMOTE, 15008), E1, "O10", id="out.app.15008"),
        pytest.param(connection(REMOTE, 15020), PASS, "O1", id="out.app.15020"),
        pytest.param(connection(f"::ffff:{REMOTE}"), E1, "O10", id="out.app.v4mapped"),
        pytest.param(connection("10.9.0.77"), E1, "O10", id="out.app.eth1"),
        pytest.param(from_proxy(REMOTE), PASS, "O3c", id="out.proxy.http"),
        pytest.param(connection(REMOTE, uid=1337), PASS, "O3c", id="out.proxyuid"),
        pytest.param(connection(REMOTE, gid=1337, uid=0), PASS, "O4c", id="out.proxygid"),
        pytest.param(connection(REMOTE, gid=1337), PASS, "O4c", id="out.appgid"),
        pytest.param(connection("127.0.0.1"), PASS, "O3b", id="lo.app.127.0.0.1"),
        pytest.param(connection("0.0.0.0"), PASS, "O3b", id="lo.app.0.0.0.0"),
        pytest.param(connection("127.0.0.5"), PASS, "O3b", id="lo.app.127.0.0.5"),
        pytest.param(connection("127.1.2.3"), PASS, "O3b", id="lo.app.127.1.2.3"),
        pytest.param(connection("::ffff:127.0.0.5"), PASS, "O3b", id="lo.app.mapped"),
        pytest.param(connection("10.0.0.5"), PASS, "O3b", id="lo.app.podip"),
        pytest.param(connection("::ffff:10.0.0.5"), PASS, "O3b", id="lo.app.podip.mapped"),
        pytest.param(connection("10.9.0.5"), PASS, "O3b", id="lo.app.podip2"),
        pytest.param(connection("10.0.0.5", 53), PASS, "O3b", id="dns.tcp.app.podip"),
        pytest.param(connection("10.0.0.5", source="127.0.0.6"), PASS, "O2", id="lo.app.podip.src6"),
        pytest.param(connection("10.0.0.5", 15001), PASS, "O3b", id="lo.app.podip.15001"),
        pytest.param(connection("127.0.0.1", 15001), PASS, "O3b", id="lo.app.127.15001"),
        pytest.param(connection("127.0.0.1", 15006), PASS, "O3b", id="lo.app.127.15006"),
        pytest.param(from_proxy("10.0.0.5"), E6, "O3a", id="lo.proxy.podip"),
        pytest.param(from_proxy("10.9.0.5"), E6, "O3a", id="lo.proxy.podip2"),
        pytest.param(from_proxy("10.0.0.5", 15090), E6, "O3a", id="lo.proxy.15090"),
        pytest.param(from_proxy("10.0.0.5", 53), E6, "O3a", id="dns.tcp.proxy.podip"),
        pytest.param(from_proxy("10.0.0.5", 15008), PASS, "O3c", id="lo.proxy.podip.15008"),
        pytest.param(from_proxy("10.0.0.5", 15020), PASS, "O1", id="lo.proxy.podip.15020"),
        pytest.param(from_proxy("127.0.0.1"), PASS, "O3c", id="lo.proxy.127.0.0.1"),
        pytest.param(from_proxy("0.0.0.0"), PASS, "O3c", id="lo.proxy.0.0.0.0"),
        pytest.param(from_proxy("127.0.0.5"), E6, "O3a", id="lo.proxy.127.0.0.5"),
        pytest.param(from_proxy("127.0.0.6", 15002), E6, "O3a", id="lo.proxy.127.0.0.6"),
        pytest.param(from_proxy("10.0.0.5", source="127.0.0.6"), PASS, "O2", id="lo.proxy.podip.src6"),
        pytest.param(from_proxy(REMOTE, source="127.0.0.6"), PASS, "O3c", id="out.proxy.src6"),
        pytest.param(connection("10.0.0.5", uid=0, gid=1337), PASS, "O3b", id="lo.proxygid.podip"),
        pytest.param(connection("2001:db8::77"), E1, "O10", id="out6.app.http"),
        pytest.param(from_proxy("2001:db8::77"), PASS, "O3c", id="out6.proxy.http"),
        pytest.param(connection("::1"), PASS, "O3b", id="lo6.app.::1"),
        pytest.param(connection("::"), PASS, "O3b", id="lo6.app.::"),
        pytest.param(connection("2001:db8::5"), PASS, "O3b", id="lo6.app.podip"),
        pytest.param(from_proxy("2001:db8::5"), E6, "O3a", id="lo6.proxy.podip"),
        pytest.param(from_proxy("::1"), PASS, "O3c", id="lo6.proxy.::1"),
        pytest.param(from_proxy("::6", 15002), E6, "O3a", id="lo6.proxy.::6"),
        pytest.param(from_proxy("2001:db8::5", source="::6"), PASS, "O2", id="lo6.proxy.podip.src6"),
    ],
)
def test_a_connection_of_a_pod_with_default_annotations(conn: Outbound, action: Action, rule: str) -> None:
    assert outbound(DEFAULT, conn) == Verdict(action, rule)


@pytest.mark.parametrize(
    ("port", "action", "rule"),
    [
        pytest.param(8080, E6, "I4", id="in.http"),
        pytest.param(80, E6, "I4", id="in.80"),
        pytest.param(22, E6, "I4", id="in.ssh"),
        pytest.param(15001, E6, "I4", id="in.15001"),
        pytest.param(15006, E6, "I4", id="in.15006"),
        pytest.param(15008, PASS, "I3", id="in.15008"),
        pytest.param(15020, PASS, "I4", id="in.15020"),
        pytest.param(15021, PASS, "I4", id="in.15021"),
        pytest.param(15090, PASS, "I4", id="in.15090"),
    ],
)
def test_a_connection_to_a_pod_with_default_annotations(port: int, action: Action, rule: str) -> None:
    assert inbound(DEFAULT, arriving(port)) == Verdict(action, rule)
    assert inbound(DEFAULT, arriving(port, "2001:db8::99")).action == action


def test_the_status_port_is_captured_once_it_is_no_longer_excluded() -> None:
    policy = CapturePolicy(exclude_outbound_ports=frozenset())
    assert outbound(policy, connection(REMOTE, 15020)).action == E1
    assert outbound(policy, from_proxy("10.0.0.5", 15020)).action == E6


def test_an_excluded_port_passes_even_for_self_calls_and_included_ports() -> None:
    policy = CapturePolicy(exclude_outbound_ports=frozenset({80}), include_outbound_ports=frozenset({80}))
    assert outbound(policy, connection(REMOTE)) == Verdict("pass", "O1")
    assert outbound(policy, from_proxy("10.0.0.5")) == Verdict("pass", "O1")


def test_without_included_ranges_nothing_is_captured() -> None:
    assert outbound(ranges(include=""), connection(REMOTE)) == Verdict("pass", "O11")


def test_self_calls_of_the_proxy_are_captured_even_without_included_ranges() -> None:
    assert outbound(ranges(include=""), from_proxy("10.0.0.5")) == Verdict("proxy-inbound", "O3a")


def test_only_included_ranges_are_captured() -> None:
    policy = ranges(include="203.0.113.0/24")
    assert outbound(policy, connection(REMOTE)) == Verdict("proxy-outbound", "O10")
    assert outbound(policy, connection(f"::ffff:{REMOTE}")) == Verdict("proxy-outbound", "O10")
    assert outbound(policy, connection("198.51.100.1")) == Verdict("pass", "O11")


def test_an_ipv6_range_says_nothing_about_ipv4() -> None:
    assert outbound(ranges(include="::/0"), connection(f"::ffff:{REMOTE}")) == Verdict("pass", "O11")


def test_an_excluded_range_beats_included_ports_and_longer_included_ranges() -> None:
    policy = ranges(include="203.0.113.7/32", exclude="203.0.113.0/24", include_outbound_ports={80})
    assert outbound(policy, connection(REMOTE)) == Verdict("pass", "O8")


def test_an_included_port_is_captured_without_included_ranges() -> None:
    policy = ranges(include="", include_outbound_ports={80})
    assert outbound(policy, connection(REMOTE, 80)) == Verdict("proxy-outbound", "O9")
    assert outbound(policy, connection(REMOTE, 81)) == Verdict("pass", "O11")


def test_an_included_loopback_range_captures_all_of_it_but_the_first_address() -> None:
    policy = ranges(include="127.0.0.0/8")
    assert outbound(policy, connection("127.0.0.5")) == Verdict("proxy-outbound", "O10")
    assert outbound(policy, connection("127.1.2.3")) == Verdict("proxy-outbound", "O10")
    assert outbound(policy, connection("127.0.0.1")) == Verdict("pass", "O7")
    assert outbound(policy, connection("0.0.0.0")) == Verdict("pass", "O7")


def test_an_app_calling_its_own_address_is_captured_with_loopback_and_that_address_included() -> None:
    policy = ranges(include="127.0.0.0/8 10.0.0.0/8")
    assert outbound(policy, connection("10.0.0.5")) == Verdict("proxy-outbound", "O10")


def test_a_proxy_known_by_its_group_calls_itself_only_with_loopback_included() -> None:
    own = connection("10.0.0.5", uid=0, gid=1337)
    assert outbound(ranges(include="127.0.0.0/8"), own) == Verdict("proxy-inbound", "O4a")


def test_another_proxy_user_makes_1337_an_ordinary_app() -> None:
    policy = CapturePolicy(proxy_uid=2000, proxy_gid=2000)
    assert outbound(policy, from_proxy(REMOTE)) == Verdict("proxy-outbound", "O10")
    assert outbound(policy, connection(REMOTE, uid=2000)) == Verdict("pass", "O3c")


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.6", "::1", "10.0.0.5", "::ffff:10.0.0.5", "2001:db8::5"])
def test_what_comes_through_the_pods_own_loopback_is_not_inbound(source: str) -> None:
    assert inbound(DEFAULT, arriving(8080, source)) == Verdict("pass", "self")


def test_without_included_inbound_ports_nothing_is_captured() -> None:
    assert inbound(CapturePolicy(inbound_all=False), arriving(8080)) == Verdict("pass", "I2")


def test_only_included_inbound_ports_are_captured_and_excluded_ones_may_be_among_them() -> None:
    policy = CapturePolicy(inbound_all=False, include_inbound_ports=frozenset({8080, 15020, 15008}))
    assert inbound(policy, arriving(8080)) == Verdict("proxy-inbound", "I5")
    assert inbound(policy, arriving(15020)) == Verdict("proxy-inbound", "I5")
    assert inbound(policy, arriving(15008)) == Verdict("pass", "I3")
    assert inbound(policy, arriving(9090)) == Verdict("pass", "I5")


@settings(derandomize=True, deadline=None)
@given(st.sampled_from([REMOTE, "10.0.0.5", "127.0.0.1", "127.0.0.5", "0.0.0.0"]), st.integers(0, 65535), st.integers())
def test_a_mapped_destination_is_decided_as_its_ipv4_address(destination: str, port: int, uid: int) -> None:
    plain = connection(destination, port, uid=uid)
    mapped = replace(plain, destination=ip_address(f"::ffff:{destination}"))
    assert outbound(DEFAULT, mapped) == outbound(DEFAULT, plain)


DNS = CapturePolicy(dns_capture=True)
TPROXY = CapturePolicy(mode="TPROXY")


def by_proxys_group(destination: str, port: int = 80, **others: Any) -> Outbound:
    return replace(connection(destination, port, uid=0, gid=1337), **others)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("policy", "conn", "action", "rule"),
    [
        pytest.param(DNS, connection(REMOTE, 53), RESOLVER, "O6", id="dns.app"),
        pytest.param(DNS, connection("127.0.0.1", 53), RESOLVER, "O6", id="dns.app.127.1"),
        pytest.param(DNS, connection("127.0.0.53", 53), RESOLVER, "O6", id="dns.app.127.53"),
        pytest.param(DNS, connection("10.0.0.5", 53), RESOLVER, "O6", id="dns.app.podip"),
        pytest.param(DNS, connection("2001:db8::53", 53), RESOLVER, "O6", id="dns6.app"),
        pytest.param(DNS, from_proxy(REMOTE, 53), PASS, "O3c", id="dns.proxy"),
        pytest.param(DNS, from_proxy("10.0.0.5", 53), PASS, "O3c", id="dns.proxy.podip"),
        pytest.param(DNS, by_proxys_group(REMOTE, 53), PASS, "O4c", id="dns.proxygid"),
        pytest.param(
            DNS.model_copy(update={"exclude_outbound_ports": {53}}),
            connection(REMOTE, 53),
            PASS,
            "O1",
            id="53 excluded",
        ),
        pytest.param(
            DNS.model_copy(update={"exclude_outbound": (ip_network("203.0.113.0/24"),)}),
            connection(REMOTE, 53),
            RESOLVER,
            "O6",
            id="an excluded range does not count",
        ),
        pytest.param(
            DNS.model_copy(update={"outbound_all": False}),
            connection(REMOTE, 53),
            RESOLVER,
            "O6",
            id="nor an empty one",
        ),
    ],
)
def test_dns_capture(
    protocol: Literal["tcp", "udp"], policy: CapturePolicy, conn: Outbound, action: Action, rule: str
) -> None:
    assert outbound(policy, replace(conn, protocol=protocol)) == Verdict(action, rule)


def test_only_dns_of_udp_is_captured() -> None:
    for policy in (DEFAULT, DNS):
        assert outbound(policy, replace(connection(REMOTE, 80), protocol="udp")).action == PASS
    assert outbound(DEFAULT, replace(connection(REMOTE, 53), protocol="udp")).action == PASS


@pytest.mark.parametrize(
    ("conn", "action", "rule"),
    [
        pytest.param(connection(REMOTE), E1, "O10", id="out.app"),
        pytest.param(connection("10.0.0.5"), PASS, "O3b", id="lo.app.podip"),
        pytest.param(by_proxys_group("10.0.0.5"), E6, "T", id="lo.proxygid.podip"),
        pytest.param(by_proxys_group("10.0.0.5", 15008), E6, "T", id="lo.proxygid.podip.15008"),
        pytest.param(from_proxy("10.0.0.5", 15008), E6, "T", id="lo.proxy.podip.15008"),
        pytest.param(by_proxys_group("10.0.0.5", 15090), PASS, "T", id="lo.proxygid.podip.15090"),
        pytest.param(by_proxys_group("127.0.0.1"), PASS, "O3b", id="lo.proxygid.127.0.0.1"),
        pytest.param(by_proxys_group("10.0.0.5", mark=1337), PASS, "O3b", id="to the app, with the client's address"),
        pytest.param(
            by_proxys_group("10.0.0.5", source=ip_address("127.0.0.6")), PASS, "O2", id="lo.proxygid.podip.src6"
        ),
    ],
)
def test_tproxy(conn: Outbound, action: Action, rule: str) -> None:
    assert outbound(TPROXY, conn) == Verdict(action, rule)


def test_the_tunnel_port_is_captured_inbound_in_tproxy_mode_alone() -> None:
    assert inbound(TPROXY, arriving(15008)) == Verdict(E6, "I4")
    assert inbound(DEFAULT, arriving(15008)) == Verdict(PASS, "I3")


def test_excluded_interfaces() -> None:
    policy = CapturePolicy(exclude_interfaces=("eth1",), dns_capture=True)
    assert outbound(policy, replace(connection("10.9.0.77"), interface="eth1")) == Verdict(PASS, "O0")
    assert outbound(policy, replace(connection("10.9.0.77", 53), interface="eth1")) == Verdict(PASS, "O0")
    assert outbound(policy, replace(connection("10.9.0.77"), interface="eth0")) == Verdict(E1, "O10")
    assert inbound(policy, replace(arriving(80), interface="eth1")) == Verdict(PASS, "I1")
    assert inbound(policy, replace(arriving(80), interface="eth0")) == Verdict(E6, "I4")
    without_lo = CapturePolicy(exclude_interfaces=("lo",))
    assert outbound(without_lo, replace(from_proxy("10.0.0.5"), interface="eth0")) == Verdict(PASS, "O0")


def test_ipv6_that_is_not_captured() -> None:
    assert outbound(DEFAULT, replace(connection("2001:db8::77"), is_ipv6_captured=False)) == Verdict(PASS, "no IPv6")
    assert outbound(DEFAULT, replace(connection(f"::ffff:{REMOTE}"), is_ipv6_captured=False)).action == E1
    assert inbound(DEFAULT, replace(arriving(80, "2001:db8::99"), is_ipv6_captured=False)) == Verdict(PASS, "no IPv6")


def test_a_pod_that_denies_it_has_nothing_past_its_proxy_that_no_annotation_asks_for() -> None:
    denying = CapturePolicy(uncaptured="deny", exclude_outbound_ports=frozenset((53,)))
    udp, ipv6 = (
        replace(connection(REMOTE, 443), protocol="udp"),
        replace(connection("2001:db8::77"), is_ipv6_captured=False),
    )
    assert outbound(denying, udp) == Verdict("refuse", "UDP")
    assert outbound(denying, ipv6) == Verdict("refuse", "no IPv6")
    assert outbound(DEFAULT, udp) == Verdict(PASS, "UDP")
    assert outbound(denying, replace(udp, port=53)) == Verdict(PASS, "O1")
    assert outbound(denying, replace(ipv6, port=53)) == Verdict(PASS, "O1")
    assert outbound(denying, connection(REMOTE)).action == E1
    for theirs in (replace(udp, uid=1337), replace(udp, gid=1337), replace(ipv6, uid=1337)):
        assert outbound(denying, theirs).action == PASS
    assert outbound(denying, replace(udp, destination=ip_address("127.0.0.1"))).action == PASS


def test_what_is_no_inbound_connection_of_the_pod() -> None:
    assert inbound(DEFAULT, replace(arriving(80), protocol="udp")) == Verdict(PASS, "UDP")
    assert inbound(DEFAULT, replace(arriving(80), destination=ip_address("198.51.100.1"))) == Verdict(PASS, "transit")
    assert inbound(DEFAULT, replace(arriving(80), destination=ip_address("10.0.0.5"))) == Verdict(E6, "I4")


def test_late_outbound_begins_when_the_pod_is_deleted_and_its_proxy_has_gone() -> None:
    late = CapturePolicy(late_outbound=True, dns_capture=True)
    for conn in (connection(REMOTE, 80), replace(connection(REMOTE, 53), protocol="udp")):
        gone = replace(conn, is_pod_deleted=True, does_proxy_listen=False)
        assert outbound(late, gone) == Verdict(PASS, "late-outbound")
        for other in ({"is_pod_deleted": False}, {"does_proxy_listen": True}, {"has_proxy_started": False}):
            assert outbound(late, replace(gone, **other)) == outbound(late, conn)  # type: ignore[arg-type]
        assert outbound(late.model_copy(update={"late_outbound": False}), gone) == outbound(late, conn)


def test_early_outbound_ends_when_the_proxy_has_started() -> None:
    early = CapturePolicy(early_outbound=True, dns_capture=True)
    for conn, action, rule in ((connection(REMOTE), E1, "O10"), (connection(REMOTE, 53), RESOLVER, "O6")):
        assert outbound(early, replace(conn, has_proxy_started=False)) == Verdict(PASS, "early-outbound")
        assert outbound(early, conn) == Verdict(action, rule)
    assert outbound(early, replace(from_proxy("10.0.0.5"), has_proxy_started=False)) == Verdict(E6, "O3a")


@pytest.mark.parametrize(("user", "rule"), [(from_proxy, "O3c"), (by_proxys_group, "O4c")])
def test_a_strict_proxy_is_the_one_in_its_container(user: Any, rule: str) -> None:
    assert outbound(DEFAULT, replace(user(REMOTE), container="unknown")) == Verdict("refuse", rule)
    assert outbound(DEFAULT, replace(user(REMOTE), container="other")) == Verdict(E1, "O10")
    assert outbound(DEFAULT, replace(user("127.0.0.1"), container="unknown")).action == PASS


def test_denied_ports_come_before_every_rule_but_not_within_the_pod() -> None:
    ports = frozenset({80})
    policy = CapturePolicy(deny_outbound_ports=ports, deny_inbound_ports=ports, exclude_outbound_ports=ports)
    for conn in (connection(REMOTE), from_proxy(REMOTE), replace(connection(REMOTE), protocol="udp")):
        assert outbound(policy, conn) == Verdict("refuse", "deny")
    assert outbound(policy, replace(connection("2001:db8::77"), is_ipv6_captured=False)) == Verdict("refuse", "deny")
    assert outbound(policy, connection("10.0.0.5")).action == PASS
    assert inbound(policy, replace(arriving(80), protocol="udp")) == Verdict("refuse", "deny")
    assert inbound(policy, arriving(80, "10.0.0.5")) == Verdict(PASS, "self")
