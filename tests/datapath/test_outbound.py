"""Connections that a mesh pod's processes make."""

from ipaddress import ip_network

import pytest

from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Wire, ip_command

FAMILIES = ["ip4", "ip6", "mapped"]


def address(wire: Wire, family: str, end: str = "peer") -> str:
    namespace = getattr(wire, end)
    return {"ip4": str(namespace.ip4), "ip6": str(namespace.ip6), "mapped": f"::ffff:{namespace.ip4}"}[family]


def plain(text: str) -> str:
    return text.removeprefix("::ffff:")


@pytest.mark.parametrize("family", FAMILIES)
def test_app_is_captured_and_both_ends_see_the_real_addresses(wire: Wire, family: str) -> None:
    target = address(wire.mesh(), family)
    seen = wire.pod.dial(target, 8080)
    assert seen["who"] == "outbound"
    assert seen["original"] == [plain(target), 8080]
    assert seen["peer"][0] == plain(address(wire, family, "pod"))
    assert seen["client_peer"] == [target, 8080]
    assert seen["client_local"][0] == address(wire, family, "pod")


@pytest.mark.parametrize("source", ["", "0.0.0.0"])
def test_ipv4_of_a_pod_with_only_a_link_local_one_comes_from_that(wire: Wire, source: str) -> None:
    for end, number in ((wire.pod, 2), (wire.peer, 1)):  # as EKS gives IPv4 to pods that have IPv6
        ip_command("-n", end.path.name, "-4", "addr", "flush", "dev", "eth0")
        ip_command("-n", end.path.name, "addr", "add", f"169.254.172.{number}/22", "dev", "eth0")
    wire.look_again()
    seen = wire.mesh(CapturePolicy()).pod.dial("169.254.172.1", 8080, source, 25200 if source else 0)
    assert (seen["who"], seen["peer"][0]) == ("outbound", "169.254.172.2")
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "outbound", "IPv6 is still the pod's only routable family"


@pytest.mark.parametrize("family", FAMILIES)
def test_excluded_port_goes_direct(wire: Wire, family: str) -> None:
    seen = wire.mesh().pod.dial(address(wire, family), 15020)
    assert seen["who"] == "remote"
    assert seen["client_peer"] == [address(wire, family), 15020]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proxys_own_connections_are_not_looped(wire: Wire, family: str) -> None:
    assert wire.mesh().pod.dial(address(wire, family), 8080, uid=PROXY)["who"] == "remote"


@pytest.mark.parametrize("family", FAMILIES)
def test_app_calling_its_own_pod_ip_goes_direct(wire: Wire, family: str) -> None:
    assert wire.mesh().pod.dial(address(wire, family, "pod"), 8080)["who"] == "app"


@pytest.mark.parametrize("family", FAMILIES)
def test_proxy_calling_its_own_pod_ip_reaches_its_inbound_listener(wire: Wire, family: str) -> None:
    target = address(wire, family, "pod")
    seen = wire.mesh().pod.dial(target, 8080, uid=PROXY)
    assert seen["who"] == "inbound"
    assert seen["original"] == [plain(target), 8080]
    assert seen["peer"][0] == plain(target)


@pytest.mark.parametrize(("family", "source"), [("ip4", "127.0.0.6"), ("ip6", "::6")])
def test_proxy_calling_its_own_pod_ip_from_the_inbound_source_reaches_the_app(
    wire: Wire, family: str, source: str
) -> None:
    seen = wire.mesh().pod.dial(address(wire, family, "pod"), 8080, source, uid=PROXY)
    assert seen["who"] == "app"
    assert seen["peer"][0] == source


@pytest.mark.parametrize(("source", "target"), [("127.0.0.1", "127.0.0.6"), ("::1", "::6")])
def test_the_probe_of_istio_validation_is_answered(wire: Wire, source: str, target: str) -> None:
    seen = wire.mesh().pod.dial(target, 15002, source, uid=PROXY)
    assert seen["who"] == "inbound"
    assert seen["original"] == [target, 15002]


@pytest.mark.parametrize("target", ["127.0.0.1", "127.0.0.5", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"])
def test_app_calling_loopback_goes_direct(wire: Wire, target: str) -> None:
    assert wire.mesh().pod.dial(target, 8080)["who"] == "app"


@pytest.mark.claim("A socket bound to a port but no address")
@pytest.mark.parametrize(("family", "wildcard"), [("ip4", "0.0.0.0"), ("ip6", "::"), ("mapped", "::")])
def test_a_socket_bound_to_a_port_only_keeps_it_and_still_comes_from_the_pod(
    wire: Wire, family: str, wildcard: str
) -> None:
    seen = wire.mesh().pod.dial(address(wire, family), 8080, wildcard, 5555)
    assert seen["who"] == "outbound"
    assert seen["peer"] == [plain(address(wire, family, "pod")), 5555]
    assert seen["original"] == [plain(address(wire, family)), 8080]


def test_without_ipv6_in_the_mesh_ipv6_goes_direct_and_ipv4_is_captured(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=False))
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "remote"
    assert wire.pod.dial(f"::ffff:{wire.peer.ip4}", 8080)["who"] == "outbound"


def test_an_exclude_beats_a_longer_include(wire: Wire) -> None:
    wire.mesh(
        CapturePolicy(
            outbound_all=False,
            include_outbound=(ip_network("10.9.0.1/32"),),
            exclude_outbound=(ip_network("10.9.0.0/16"),),
        )
    )
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"


def test_an_ipv6_default_range_says_nothing_about_ipv4(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, exclude_outbound=(ip_network("::/0"),)))
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "remote"
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"


def test_an_included_port_is_captured_outside_of_the_included_ranges(wire: Wire) -> None:
    wire.mesh(CapturePolicy(outbound_all=False, include_outbound_ports=frozenset({8080})))
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert wire.pod.dial(wire.peer.ip4, 9090)["who"] == "remote"


def test_only_included_ranges_are_captured(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, outbound_all=False, include_outbound=(ip_network("fd99::/64"),)))
    assert wire.pod.dial(wire.peer.ip6, 8080)["who"] == "outbound"
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"


@pytest.mark.claim("port 15001 refuses the connection")
def test_captured_with_no_proxy_is_refused_not_sent_in_the_clear(wire: Wire) -> None:
    wire.enrol()
    wire.peer.serve("remote", "8080", uid=0)
    assert wire.pod.dial(wire.peer.ip4, 8080) == {"error": "Connection refused"}


def test_a_process_outside_of_the_mesh_is_untouched(wire: Wire) -> None:
    wire.mesh()
    wire.peer.serve("neighbour", "7070", uid=0)
    assert wire.peer.dial(wire.peer.ip4, 7070)["who"] == "neighbour"


def test_a_socket_connected_anew_shows_its_new_peer(wire: Wire) -> None:
    wire.mesh()
    seen = wire.pod.python(
        """
import ctypes, json, socket, struct, sys
s = socket.socket()
s.connect((sys.argv[1], 8080))
captured = s.getpeername()
unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
assert ctypes.CDLL(None).connect(s.fileno(), unspecified, len(unspecified)) == 0
s.connect((sys.argv[1], 15020))
print(json.dumps([captured, s.getpeername(), json.loads(s.makefile().readline())["who"]]))
""",
        wire.peer.ip4,
    )
    assert seen == [[str(wire.peer.ip4), 8080], [str(wire.peer.ip4), 15020], "remote"]


def test_connections_are_spread_over_loopback(wire: Wire) -> None:
    wire.mesh()
    first, again, other = (wire.pod.dial(wire.peer.ip4, port)["local"][0] for port in (8080, 8080, 9090))
    assert first == again != other
    assert all(int(each.split(".")[1]) in range(64, 128) for each in (first, other))


def test_more_connections_than_ephemeral_ports_of_one_address(wire: Wire) -> None:
    """90 connections to two destinations with 50 source ports: on one loopback address they would not fit."""
    wire.mesh()
    code = """
import json, socket, sys
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("40000 40049")
held = []
for port in (8080, 9090):
    for _ in range(45):
        s = socket.socket()
        s.connect((sys.argv[1], port))
        held.append(s)
print(json.dumps(len(held)))
"""
    assert wire.pod.python(code, wire.peer.ip4, uid=0) == 90


def test_other_socket_options_are_left_alone(wire: Wire) -> None:
    wire.mesh()
    lengths = wire.pod.python(
        """
import json, socket, sys
s = socket.socket()
s.connect((sys.argv[1], 8080))
print(json.dumps([len(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)),
                  s.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)]))
""",
        wire.peer.ip4,
    )
    assert lengths[0] > 100
    assert lengths[1] == 1


@pytest.mark.claim("are captured and the proxy gets their destination")
def test_an_mptcp_client_is_captured_with_its_original_destination(wire: Wire) -> None:
    wire.mesh()
    code = """
import json, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP
s.connect((sys.argv[1], 8080))
print(s.makefile().readline())
"""
    seen = wire.pod.python(code, wire.peer.ip4)
    assert (seen["who"], seen["original"]) == ("outbound", [str(wire.peer.ip4), 8080])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_opened_by_its_first_data_is_captured(wire: Wire, family: str) -> None:
    """TCP Fast Open: there is no connect() of the application's."""
    target = address(wire.mesh(), family)
    code = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
s.sendto(b"x", socket.MSG_FASTOPEN, (sys.argv[1], 8080))
print(s.makefile().readline())
"""
    seen = wire.pod.python(code, target)
    assert (seen["who"], seen["original"]) == ("outbound", [plain(target), 8080])


def test_the_addresses_that_connections_are_spread_over_lead_nowhere_else(wire: Wire) -> None:
    """Whoever dials them himself reaches the proxy's own port, which black-holes, or the pod's own applications."""
    wire.mesh()
    for target in ("127.64.1.2", "fd73:6964:6573:7465::1"):
        seen = wire.pod.dial(target, 15001)
        assert (seen["who"], seen["original"]) == ("outbound", [target, 15001])
        assert wire.pod.dial(target, 8080)["who"] == "app"
