"""The kernel half's policy.h and address.h, compiled with gcc, decide as the reference in Python does."""

import ctypes
import errno
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.layout import RULES, Address, NetworkVerdict, PodFlags, PortRule
from cni.enrolment.entries import Entries, Identity, entries_of
from cni.netns.sandbox import InterfaceAddress, Sandbox
from cni.policy.annotations import CapturePolicy
from cni.policy.decision import (
    TPROXY_MARK,
    Container,
    Inbound,
    IPAddress,
    Outbound,
    Verdict,
    inbound,
    outbound,
    refusal,
)
from cni.policy.prefixes import effective_prefixes
from tests.unit.compile_c import build

SOURCE = """
#include "address.h"
#include "policy.h"
struct facts { unsigned ports, network, mark, route_error; unsigned short port; bool udp, own, excluded, uid, gid;
               bool chosen; unsigned char container; };
int outbound(unsigned flags, struct address *to, struct address *source, struct facts *given)
{
    struct outbound facts = {.ports = given->ports, .network = given->network, .mark = given->mark, .port = given->port,
                             .udp = given->udp, .excluded_interface = given->excluded, .proxy_uid = given->uid,
                             .proxy_gid = given->gid, .container = given->container,
                             .route_error = given->route_error};
    struct destination destination = {.address = *to, .family = is_mapped(to) ? AF_INET : AF_INET6};
    resolve_unspecified(&destination, source);
    facts.first_loopback = is_first_loopback(&destination.address);
    facts.loopback = is_on_lo(&destination.address) || given->own;
    facts.from_inbound = is_inbound_source(source) || given->chosen;
    facts.multicast = is_multicast(&destination.address);
    facts.from_loopback = is_mapped(source) && is_loopback(source) && !is_unspecified(source);
    struct decision decision = with_route(flags, &facts, decide_outbound(flags, &facts));
    return decision.verdict | decision.rule << 8 | decision.error << 16;
}
int inbound(unsigned flags, struct address *source, bool own, unsigned short port, unsigned ports, bool excluded)
{
    struct decision decision = decide_inbound(flags, port, ports, excluded);
    return is_on_lo(source) || own ? VERDICT_PASS : decision.verdict | decision.rule << 8;
}
"""
VERDICTS = ["pass", "proxy-outbound", "proxy-inbound", "dns", "refuse", "unreachable"]
CONTAINERS: list[Container] = ["trusted", "other", "unknown"]  # enum container
OWN = (IPv4Address("10.9.0.2"), IPv6Address("fd99::2"))
SANDBOX = Sandbox(1, tuple(InterfaceAddress(ip, 2, ip) for ip in OWN))


def plain(address: IPAddress) -> IPAddress:
    """What the kernel half looks up: it takes mapped addresses for IPv4, as connect6 does."""
    return getattr(address, "ipv4_mapped", None) or address


addresses = (
    st.sampled_from(
        [
            *OWN,
            *map(
                ip_address,
                [
                    "::ffff:10.9.0.2",
                    "::ffff:127.0.0.1",
                    "::ffff:10.9.0.1",
                    "127.0.0.1",
                    "127.0.0.5",
                    "127.0.0.6",
                    "::1",
                    "::6",
                    "0.0.0.0",
                    "::",
                    "10.9.0.1",
                    "fd99::1",
                    "224.0.0.251",
                    "ff02::1",
                    "255.255.255.255",
                ],
            ),
        ]
    )
    | st.ip_addresses()
)
ports = st.sampled_from([0, 22, 53, 80, 8080, 15001, 15006, 15008, 15020, 15021, 15090, 65535])
networks = st.sampled_from(
    [
        ip_network(text)
        for text in ("0.0.0.0/0", "::/0", "10.0.0.0/8", "10.9.0.0/16", "10.9.0.1/32", "127.0.0.0/8", "fd99::/64")
    ]
)
policies = st.builds(
    CapturePolicy,
    outbound_all=st.booleans(),
    include_outbound=st.lists(networks, max_size=3).map(tuple),
    exclude_outbound=st.lists(networks, max_size=3).map(tuple),
    include_outbound_ports=st.frozensets(ports, max_size=3),
    exclude_outbound_ports=st.frozensets(ports, max_size=3),
    inbound_all=st.booleans(),
    include_inbound_ports=st.frozensets(ports, max_size=3),
    exclude_inbound_ports=st.frozensets(ports, max_size=3),
    loopback_included=st.booleans(),
    exclude_interfaces=st.lists(st.sampled_from(["lo", "eth0", "eth1"]), max_size=2).map(tuple),
    dns_capture=st.booleans(),
    mode=st.sampled_from(["REDIRECT", "TPROXY"]),
)
owners = st.sampled_from([0, 1000, 1337])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("policy"), SOURCE, "-shared", "-fPIC")))


def entries(policy: CapturePolicy) -> Entries:
    return entries_of(Identity("", "", "", "", "", ""), policy, SANDBOX, (policy.proxy_uid, policy.proxy_gid))


def longest_match(policy: CapturePolicy, address: IPAddress) -> int:
    matches = [prefix for prefix in effective_prefixes(policy) if address in prefix.network]
    if not matches:
        return 0
    longest = max(matches, key=lambda prefix: prefix.network.prefixlen)
    return NetworkVerdict.EXCLUDED if longest.verdict == "exclude" else NetworkVerdict.INCLUDED


def is_same_rule(kernels: str, expected: Verdict) -> None:
    """T is inbound rules asked outbound, I2 an I5 whose list is empty; the kernel calls them so.

    With an interface excluded, I1 lets pass what O0 has let pass already.
    """
    others = {"O0": ("O0", "I1"), "T": ("I1", "I3", "I4", "I5"), "I2": ("I1", "I3", "I5"), "self": ("",)}
    assert kernels in others.get(expected.rule, (expected.rule,)), expected


class Facts(ctypes.Structure):
    """What the hook finds out before it decides."""

    _fields_ = [
        ("ports", ctypes.c_uint),
        ("network", ctypes.c_uint),
        ("mark", ctypes.c_uint),
        ("route_error", ctypes.c_uint),
        ("port", ctypes.c_ushort),
        *((name, ctypes.c_bool) for name in ("udp", "own", "excluded", "uid", "gid", "chosen")),
        ("container", ctypes.c_uint8),
    ]


connections = st.builds(
    Outbound,
    destination=addresses,
    port=ports,
    source=st.none() | addresses,
    uid=owners,
    gid=owners,
    own_addresses=st.just(frozenset(OWN)),
    protocol=st.sampled_from(["tcp", "tcp", "udp"]),
    interface=st.sampled_from(["eth0", "eth1", "lo"]),
    route_error=st.sampled_from([0, 0, errno.ENETUNREACH, errno.EACCES]),
    does_loopback_stay=st.booleans(),
    mark=st.sampled_from([0, TPROXY_MARK]),
    container=st.sampled_from(CONTAINERS),
)


def is_of_one_family(conn: Outbound) -> bool:
    return conn.source is None or plain(conn.source).version == plain(conn.destination).version


def is_lo_chosen(conn: Outbound, to: IPAddress) -> bool:
    """Whether the kernel chooses ::6 as the source: for an address that is local by a route alone."""
    is_on_lo = to.is_loopback or to.is_unspecified or to in OWN or to == IPv6Address("::6")
    is_bound = conn.source is not None and not plain(conn.source).is_unspecified
    return to.version == 6 and conn.interface == "lo" and not is_on_lo and not is_bound


@given(policy=policies, conn=connections.filter(is_of_one_family))
def test_outbound(kernel: ctypes.CDLL, policy: CapturePolicy, conn: Outbound) -> None:
    pod, to = entries(policy), plain(conn.destination)
    if to == IPv4Address(0) and isinstance(bound := plain(conn.source or to), IPv4Address):
        to = bound  # the kernel dials what the socket is bound to
    is_lo = to.is_loopback or to.is_unspecified or to in OWN or to == IPv6Address("::6") or conn.interface == "lo"
    facts = Facts(
        ports=pod.terms.port_rules.get(conn.port, PortRule(0)),
        network=longest_match(policy, to),
        mark=conn.mark,
        port=conn.port,
        udp=conn.protocol == "udp",
        own=to in OWN or conn.interface == "lo",
        route_error=conn.route_error,
        excluded=("lo" if is_lo else conn.interface) in policy.exclude_interfaces,
        uid=conn.uid == policy.proxy_uid,
        gid=conn.gid == policy.proxy_gid,
        chosen=is_lo_chosen(conn, to),
        container=CONTAINERS.index(conn.container),
    )
    found = kernel.outbound(
        pod.flags & ~PodFlags.IPV6 | (PodFlags.LOOPBACK_STAYS if conn.does_loopback_stay else PodFlags(0)),
        ctypes.byref(Address.of(conn.destination)),
        ctypes.byref(Address.of(conn.source)),
        ctypes.byref(facts),
    )
    expected = outbound(policy, conn)
    assert VERDICTS[found & 0xFF] == expected.action, expected
    assert found >> 16 == (refusal(conn) if expected.action == "unreachable" else 0)
    if conn.protocol == "tcp":  # of other UDP the kernel does not ask further once it is not DNS
        is_same_rule(RULES[found >> 8 & 0xFF], expected)


@given(
    policy=policies,
    source=addresses.filter(lambda ip: not plain(ip).is_unspecified),
    port=ports,
    interface=st.sampled_from(["eth0", "eth1"]),
)
def test_inbound(kernel: ctypes.CDLL, policy: CapturePolicy, source: IPAddress, port: int, interface: str) -> None:
    pod = entries(policy)
    found = kernel.inbound(
        pod.flags,
        ctypes.byref(Address.of(source)),
        plain(source) in OWN,
        port,
        pod.terms.port_rules.get(port, PortRule(0)),
        interface in policy.exclude_interfaces,
    )
    expected = inbound(policy, Inbound(port, source, frozenset(OWN), interface))
    assert VERDICTS[found & 0xFF] == expected.action, expected
    is_same_rule(RULES[found >> 8], expected)
