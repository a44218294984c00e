"""excludeInterfaces: outbound by the route, inbound by the interface that a packet arrives on."""

from collections.abc import Iterator

import pytest

from bpf.extras import VARIABLE
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Kernel, Wire, fresh_kernel, ip_command

# what the peer has on the second cable, and what only a route through it leads to
SECOND4, SECOND6 = "10.10.0.1", "fd9a::1"
BEHIND4, BEHIND6 = "203.0.113.1", "2001:db8::1"


@pytest.fixture(scope="module", params=["", "ingress_ifindex"])
def lacking(request: pytest.FixtureRequest) -> str:
    """The extra that the kernel lacks: it does not tell programs which interface a packet arrived on."""
    return str(request.param)


@pytest.fixture(scope="module")
def kernel(lacking: str) -> Iterator[Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, lacking)
        with fresh_kernel() as made:
            yield made


@pytest.fixture
def two_cables(wire: Wire) -> Wire:
    """A second cable between pod and peer, and addresses behind it."""
    pod, peer = wire.pod.path.name, wire.peer.path.name
    ip_command("link", "add", "eth1", "netns", pod, "type", "veth", "peer", "name", "eth1", "netns", peer)
    for name, number in ((pod, 2), (peer, 1)):
        ip_command("-n", name, "link", "set", "eth1", "up")
        ip_command("-n", name, "addr", "add", f"10.10.0.{number}/24", "dev", "eth1")
        ip_command("-n", name, "addr", "add", f"fd9a::{number}/64", "dev", "eth1", "nodad")
    for behind, via in ((BEHIND4, SECOND4), (BEHIND6, SECOND6)):
        ip_command("-n", pod, "route", "add", behind, "via", via)
        ip_command("-n", peer, "addr", "add", behind, "dev", "lo")
    wire.look_again()
    return wire


EXCLUDED = CapturePolicy(dual_stack=True, exclude_interfaces=("eth1",))


@pytest.mark.parametrize("target", [SECOND4, SECOND6, f"::ffff:{SECOND4}", BEHIND4, BEHIND6])
def test_what_leaves_through_an_excluded_interface_goes_direct(two_cables: Wire, target: str) -> None:
    two_cables.mesh(EXCLUDED)
    assert two_cables.pod.dial(target, 8080)["who"] == "remote"


def test_what_leaves_through_another_one_is_captured(two_cables: Wire) -> None:
    two_cables.mesh(EXCLUDED)
    assert two_cables.pod.dial(two_cables.peer.ip4, 8080)["who"] == "outbound"
    assert two_cables.pod.dial(two_cables.peer.ip6, 8080)["who"] == "outbound"


def test_nothing_is_excluded_unless_asked_for(two_cables: Wire) -> None:
    two_cables.mesh()
    assert two_cables.pod.dial(SECOND4, 8080)["who"] == "outbound"
    assert two_cables.peer.dial("10.10.0.2", 8080, uid=0)["who"] == "inbound"


@pytest.mark.parametrize(("target", "source"), [("10.10.0.2", ""), ("fd9a::2", "")])
def test_what_arrives_on_an_excluded_interface_reaches_the_app(two_cables: Wire, target: str, source: str) -> None:
    two_cables.mesh(EXCLUDED)
    assert two_cables.peer.dial(target, 8080, source, uid=0)["who"] == "app"


@pytest.mark.parametrize(("target", "via"), [("10.10.0.2", "10.9.0.2"), ("fd9a::2", "fd99::2")])
def test_an_address_of_an_excluded_interface_is_captured_by_another_way(
    two_cables: Wire, lacking: str, target: str, via: str
) -> None:
    """A kernel that does not tell the interface goes by the address, so the excluded one's are never captured."""
    ip_command("-n", two_cables.peer.path.name, "route", "add", target, "via", via)
    two_cables.mesh(EXCLUDED)
    source = str(two_cables.peer.ip6 if ":" in target else two_cables.peer.ip4)
    assert two_cables.peer.dial(target, 8080, source, uid=0)["who"] == ("app" if lacking else "inbound")


@pytest.mark.parametrize(("target", "via"), [("10.9.0.2", "10.10.0.2"), ("fd99::2", "fd9a::2")])
def test_an_address_of_another_interface_is_direct_by_the_excluded_one(
    two_cables: Wire, lacking: str, target: str, via: str
) -> None:
    """A kernel that does not tell the interface goes by the address: captured, as if it had come the usual way."""
    ip_command("-n", two_cables.peer.path.name, "route", "add", target, "via", via)
    two_cables.mesh(EXCLUDED)
    source = SECOND6 if ":" in target else SECOND4
    assert two_cables.peer.dial(target, 8080, source, uid=0)["who"] == ("inbound" if lacking else "app")


def test_an_address_that_no_interface_has_is_captured(two_cables: Wire, lacking: str) -> None:
    """It is local by a route alone. Only by the interface that it arrives on could it be excluded."""
    ip_command("-n", two_cables.pod.path.name, "route", "add", "local", "10.10.0.9", "dev", "lo")
    two_cables.mesh(EXCLUDED)
    assert two_cables.peer.dial("10.10.0.9", 8080, uid=0)["who"] == ("inbound" if lacking else "app")


def test_a_socket_bound_to_an_excluded_interface_goes_direct(two_cables: Wire) -> None:
    two_cables.mesh(EXCLUDED)
    code = """
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1")
s.connect((sys.argv[1], 8080))
print(s.makefile().readline())
"""
    assert two_cables.pod.python(code, SECOND4, uid=0)["who"] == "remote"


def test_excluding_lo_lets_self_calls_of_the_proxy_through(wire: Wire) -> None:
    wire.mesh(CapturePolicy(dual_stack=True, exclude_interfaces=("lo",)))
    for target in (wire.pod.ip4, wire.pod.ip6):
        assert wire.pod.dial(target, 8080, uid=PROXY)["who"] == "app"
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
