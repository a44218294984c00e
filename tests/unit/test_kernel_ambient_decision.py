"""The kernel half's ambient_policy.h, compiled with gcc, decides as the reference in Python does."""

import ctypes
import errno
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bpf.layout import RULES, Address, PodFlags
from cni.enrolment.ambient import ambient_flags
from cni.policy.ambient_decision import ORIGINAL_SOURCE_MARK, ZTUNNEL_MARK, inbound, outbound
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.decision import Inbound, IPAddress, Outbound, plain, refusal, routed
from tests.unit.compile_c import build
from tests.unit.test_kernel_decision import CONTAINERS, OWN, VERDICTS, addresses, is_of_one_family, ports

SOURCE = """
#include "address.h"
#include "policy.h"
#include "ambient_policy.h"
struct facts { unsigned mark, route_error; unsigned short port; bool udp, own; unsigned char container; };
int outbound(unsigned flags, struct address *to, struct address *source, struct facts *given)
{
    struct outbound facts = {.mark = given->mark, .port = given->port, .udp = given->udp,
                             .container = given->container, .route_error = given->route_error};
    struct destination destination = {.address = *to, .family = is_mapped(to) ? AF_INET : AF_INET6};
    resolve_unspecified(&destination, source);
    facts.first_loopback = is_first_loopback(&destination.address);
    facts.loopback = is_on_lo(&destination.address) || given->own;
    facts.multicast = is_multicast(&destination.address);
    facts.from_loopback = is_mapped(source) && is_loopback(source) && !is_unspecified(source);
    struct decision decision = with_route(flags, &facts, decide_ambient_outbound(flags, &facts));
    return decision.verdict | decision.rule << 8 | decision.error << 16;
}
int inbound(unsigned flags, struct address *source, bool own, unsigned short port)
{
    struct decision decision = decide_ambient_inbound(flags, port);
    return is_on_lo(source) || own ? VERDICT_PASS : decision.verdict | decision.rule << 8;
}
"""

policies = st.builds(
    AmbientPolicy, dns_capture=st.booleans(), bypass_inbound_capture=st.booleans(), trust_mark=st.booleans()
)
marks = st.sampled_from([0, ZTUNNEL_MARK, ORIGINAL_SOURCE_MARK, 0x1539, 0x7111, 0x539 << 4, 1337 << 16, 0xFFFFFFFF])
connections = st.builds(
    Outbound,
    destination=addresses,
    port=ports,
    source=st.none() | addresses,
    own_addresses=st.just(frozenset(OWN)),
    protocol=st.sampled_from(["tcp", "tcp", "udp"]),
    interface=st.sampled_from(["eth0", "lo"]),
    route_error=st.sampled_from([0, 0, errno.ENETUNREACH, errno.EACCES]),
    does_loopback_stay=st.booleans(),
    mark=marks,
    container=st.sampled_from(CONTAINERS),
)


class Facts(ctypes.Structure):
    """What the hook finds out before it decides."""

    _fields_ = [
        ("mark", ctypes.c_uint),
        ("route_error", ctypes.c_uint),
        ("port", ctypes.c_ushort),
        ("udp", ctypes.c_bool),
        ("own", ctypes.c_bool),
        ("container", ctypes.c_uint8),
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("policy"), SOURCE, "-shared", "-fPIC")))


@given(policy=policies, conn=connections.filter(is_of_one_family))
def test_outbound(kernel: ctypes.CDLL, policy: AmbientPolicy, conn: Outbound) -> None:
    facts = Facts(
        mark=conn.mark,
        route_error=conn.route_error,
        port=conn.port,
        udp=conn.protocol == "udp",
        own=routed(conn) in OWN or conn.interface == "lo",
        # a pod that trusts the mark asks nobody about containers
        container=CONTAINERS.index("trusted" if policy.trust_mark else conn.container),
    )
    stays = PodFlags.LOOPBACK_STAYS if conn.does_loopback_stay else PodFlags(0)
    found = kernel.outbound(
        ambient_flags(policy) | stays,
        ctypes.byref(Address.of(conn.destination)),
        ctypes.byref(Address.of(conn.source)),
        ctypes.byref(facts),
    )
    expected = outbound(policy, conn)
    assert VERDICTS[found & 0xFF] == expected.action, expected
    assert found >> 16 == (refusal(conn) if expected.action == "unreachable" else 0)
    assert RULES[found >> 8 & 0xFF] == expected.rule


@given(policy=policies, source=addresses.filter(lambda ip: not plain(ip).is_unspecified), port=ports)
@example(policy=AmbientPolicy(), source=ip_address("203.0.113.9"), port=15008)
def test_inbound(kernel: ctypes.CDLL, policy: AmbientPolicy, source: IPAddress, port: int) -> None:
    is_own = plain(source) in OWN
    found = kernel.inbound(ambient_flags(policy), ctypes.byref(Address.of(source)), is_own, port)
    expected = inbound(policy, Inbound(port, source, frozenset(OWN)))
    assert VERDICTS[found & 0xFF] == expected.action, expected
    assert RULES[found >> 8] == ("" if expected.rule == "self" else expected.rule)
