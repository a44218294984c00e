"""What the kernel would refuse for want of a route fails with its errno: Istio's rules are asked after the route.

The proxy's connections pass, so they show what the kernel says of the same call.
"""

import errno
import json
import subprocess
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from random import Random

import pytest
from pyroute2.netlink import rtnl

from bpf.layout import TOTALS
from cni.netns import sandbox
from cni.netns.dumps import Dump
from cni.netns.routes import IpNetwork
from cni.netns.rtnl import IpAddress, Rtnl
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import APP, PROXY, Wire, ip_command
from tests.lab.inside import PYTHON

REMOTE4, REMOTE6 = "203.0.113.7", "2001:db8:1::7"
FAMILIES = [REMOTE4, REMOTE6, f"::ffff:{REMOTE4}"]
DNS = CapturePolicy(dual_stack=True, dns_capture=True)
CALL = """
import errno, json, socket, sys
how, host, source = sys.argv[1:]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
client = socket.socket(family, socket.SOCK_STREAM if how == "tcp" else socket.SOCK_DGRAM)
client.settimeout(0.3)
try:
    if source:
        client.bind((source, 0))
    if how == "unconnected":
        client.sendto(b"?", (host, 53))
    else:
        client.connect((host, 8080 if how == "tcp" else 53))
    print(json.dumps("done"))
except TimeoutError:
    print(json.dumps("done"))
except OSError as error:
    print(json.dumps(errno.errorcode.get(error.errno, str(error))))
"""


def call(wire: Wire, host: str, how: str = "tcp", source: str = "", uid: int = APP) -> str:
    """What one call comes to: an errno, or done, also if nobody answers."""
    return str(wire.pod.python(CALL, how, host, source, uid=uid))


def route(wire: Wire, *words: str) -> None:
    """Change the pod's routes; IPv6 is recognised by its colon."""
    family = "-6" if any(":" in word for word in words) else "-4"
    ip_command(family, "-n", wire.pod.path.name, "route", *words)


def without_default(wire: Wire) -> Wire:
    for gateway in (wire.peer.ip4, wire.peer.ip6):
        route(wire, "del", "default", "via", str(gateway))
    wire.look_again()
    return wire


@pytest.mark.parametrize("target", FAMILIES)
def test_without_a_route_connect_fails_at_once(wire: Wire, target: str) -> None:
    without_default(wire).mesh()
    assert call(wire, target) == call(wire, target, uid=PROXY) == "ENETUNREACH"


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_what_has_a_route_is_captured_where_others_have_none(wire: Wire, family: str) -> None:
    without_default(wire).mesh()
    assert wire.pod.dial(getattr(wire.peer, family), 8080)["who"] == "outbound"


@pytest.mark.parametrize("how", ["connected", "unconnected"])
@pytest.mark.parametrize("target", FAMILIES)
def test_dns_without_a_route_fails_at_once(wire: Wire, target: str, how: str) -> None:
    without_default(wire).mesh(DNS)
    assert call(wire, target, how) == call(wire, target, how, uid=PROXY) == "ENETUNREACH"
    nameserver = str(wire.peer.ip6) if ":" in target else str(wire.peer.ip4)
    assert call(wire, nameserver, how) == "done"


@pytest.mark.parametrize(
    ("kind", "error"), [("unreachable", "EHOSTUNREACH"), ("prohibit", "EACCES"), ("blackhole", "EINVAL")]
)
@pytest.mark.parametrize(
    ("network", "inside", "beside"),
    [("203.0.113.0/24", REMOTE4, "198.51.100.7"), ("2001:db8:1::/48", REMOTE6, "2001:db8:2::7")],
)
def test_a_route_that_leads_nowhere(wire: Wire, network: str, inside: str, beside: str, kind: str, error: str) -> None:
    route(wire, "add", kind, network)
    wire.look_again()
    wire.mesh()
    assert call(wire, inside) == call(wire, inside, uid=PROXY) == error
    assert wire.pod.dial(beside, 8080)["who"] == "outbound"


def test_a_way_out_of_a_prefix_that_leads_nowhere(wire: Wire) -> None:
    for network, within in (("203.0.113.0/24", REMOTE4), ("2001:db8:1::/48", REMOTE6)):
        route(wire, "add", "unreachable", network)
        route(wire, "add", within, "via", str(wire.peer.ip6 if ":" in network else wire.peer.ip4))
    wire.look_again()
    wire.mesh()
    assert [call(wire, "203.0.113.8"), call(wire, "2001:db8:1::8")] == ["EHOSTUNREACH"] * 2
    assert [wire.pod.dial(target, 8080)["who"] for target in FAMILIES] == ["outbound"] * 3


def test_throw_asks_further_and_finds_nothing(wire: Wire) -> None:
    route(wire, "add", "throw", "203.0.113.0/24")
    wire.look_again()
    wire.mesh()
    assert call(wire, REMOTE4) == call(wire, REMOTE4, uid=PROXY) == "ENETUNREACH"


@pytest.mark.parametrize("target", ["224.0.0.251", "239.1.2.3", "255.255.255.255", "10.9.0.255", "ff02::fb", "ff0e::1"])
def test_tcp_to_many(wire: Wire, target: str) -> None:
    wire.mesh()
    assert call(wire, target) == call(wire, target, uid=PROXY) == "ENETUNREACH"


@pytest.mark.parametrize(
    ("how", "policy"), [("tcp", CapturePolicy(dual_stack=True)), ("connected", DNS), ("unconnected", DNS)]
)
def test_from_loopback_to_the_outside(wire: Wire, how: str, policy: CapturePolicy) -> None:
    wire.mesh(policy)
    for source in ("127.0.0.1", "127.1.2.3"):
        assert call(wire, REMOTE4, how, source) == call(wire, REMOTE4, how, source, uid=PROXY) == "EINVAL"
    assert call(wire, "::ffff:203.0.113.7", how, "::ffff:127.0.0.1") == "EINVAL"
    assert call(wire, str(wire.pod.ip4), how, "127.0.0.1") == call(wire, str(wire.pod.ip4), how, "127.0.0.1", uid=PROXY)


def test_from_loopback_where_the_widest_route_stays_in_the_pod(wire: Wire) -> None:
    route(wire, "add", "local", "10.200.0.0/16", "dev", "lo")
    without_default(wire).mesh()
    assert call(wire, str(wire.peer.ip4), source="127.0.0.1") == "EINVAL"


def test_a_pod_may_be_allowed_to_send_from_loopback(wire: Wire) -> None:
    setting = "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet"
    subprocess.run(["nsenter", f"--net={wire.pod.path}", "sh", "-c", setting], check=True)
    wire.look_again()
    seen = wire.mesh().pod.dial(REMOTE4, 8080, "127.0.0.1")
    assert (seen["who"], seen["peer"][0]) == ("outbound", "127.0.0.1")


def test_ipv4_in_a_pod_with_ipv6_alone(wire: Wire) -> None:
    ip_command("-n", wire.pod.path.name, "-4", "addr", "flush", "dev", "eth0")
    wire.look_again()
    wire.mesh(CapturePolicy())
    for target in (REMOTE4, f"::ffff:{REMOTE4}", str(wire.peer.ip4)):
        assert call(wire, target) == call(wire, target, uid=PROXY) == "ENETUNREACH"
    assert wire.pod.dial(REMOTE6, 8080)["who"] == "outbound"
    assert wire.pod.dial("127.0.0.1", 8080)["who"] == "app"


def test_a_rule_of_the_pods_own_makes_its_routes_unknown(wire: Wire) -> None:
    name = wire.pod.path.name
    ip_command("-n", name, "rule", "add", "from", str(wire.pod.ip4), "lookup", "100")
    ip_command("-n", name, "route", "add", "default", "via", str(wire.peer.ip4), "table", "100")
    without_default(wire).mesh()
    assert wire.pod.dial(REMOTE4, 8080)["who"] == "outbound"
    assert call(wire, REMOTE6) == "ENETUNREACH", "IPv6 has no rule of the pod's own"


def test_a_rule_for_marks_does_not(wire: Wire) -> None:
    ip_command("-n", wire.pod.path.name, "rule", "add", "fwmark", "1337", "lookup", "133")
    without_default(wire).mesh()
    assert call(wire, REMOTE4) == "ENETUNREACH"


@pytest.mark.parametrize(("count", "outcome"), [(sandbox.MAX_ROUTES, "EHOSTUNREACH"), (sandbox.MAX_ROUTES + 1, "done")])
def test_too_many_routes_count_as_unknown(wire: Wire, count: int, outcome: str) -> None:
    """There is one more, for the broadcast address."""
    hosts = [f"10.66.{number // 256}.{number % 256}" for number in range(count - 1)]
    batch = "".join(f"route add unreachable {host}\n" for host in hosts)
    subprocess.run(["ip", "-n", wire.pod.path.name, "-batch", "-"], input=batch, text=True, check=True)
    wire.look_again()
    wire.mesh()
    assert call(wire, "10.66.0.1") == outcome


ASK = """
import errno, json, socket, sys
answers = []
for host in json.load(sys.stdin):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as asking:
        answers.append(asking.connect_ex((host, 9)))
print(json.dumps(answers))
"""


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("has_default", [True, False])
def test_what_is_kept_of_any_routes_says_what_the_kernel_does(wire: Wire, seed: int, has_default: bool) -> None:
    rng = Random(seed)
    gateways = {4: wire.peer.ip4, 6: wire.peer.ip6}
    kinds = ("via", "via", "unreachable", "prohibit", "blackhole", "throw", "local")
    networks: list[IpNetwork] = []
    commands = []
    for _ in range(rng.randint(1, 40)):
        version, length = rng.choice(((4, rng.randint(9, 32)), (6, rng.randint(33, 128))))
        base = rng.choice(networks).network_address if networks and rng.random() < 0.6 else None
        if base is None or base.version != version:
            base = ip_address("10.128.0.0" if version == 4 else "fd55::") + (rng.getrandbits(6) << 12)
        network = ip_network((base, length), strict=False)
        kind = rng.choice(kinds)
        if any(network == each for each in networks) or (version == 6 and kind == "local"):
            continue
        networks.append(network)
        how = {"via": f"{network} via {gateways[version]}", "local": f"local {network} dev lo"}
        commands.append(f"route add {how.get(kind, f'{kind} {network}')}")
    batch = "\n".join(commands) + "\n"
    subprocess.run(["ip", "-n", wire.pod.path.name, "-batch", "-"], input=batch, text=True, check=True)
    if has_default:
        wire.look_again()
    else:
        without_default(wire)
    hosts = [str(host) for host in _around(rng, networks)]
    argv = ["nsenter", f"--net={wire.pod.path}", *PYTHON, ASK]
    told = json.loads(subprocess.run(argv, input=json.dumps(hosts), capture_output=True, text=True, check=True).stdout)
    known = [(network, way) for network, way in wire.sandbox.ways.items() if not (way.error and way.ifindex)]
    for host, errors in zip(hosts, told, strict=True):
        fitting = [each for each in known if ip_address(host) in each[0]]
        error = max(fitting, key=lambda each: each[0].prefixlen)[1].error if fitting else 0
        assert errno.errorcode.get(error) == errno.errorcode.get(errors), (host, commands)


def _around(rng: Random, networks: list[IpNetwork]) -> list[IpAddress]:
    """Addresses at the edges of networks and beyond them."""
    found: list[IpAddress] = [ip_address(each) for each in (REMOTE4, REMOTE6, "10.9.0.1", "fd99::1")]
    for network in networks:
        last = network.num_addresses - 1
        found += [network[0], network[last], network[rng.randint(0, last)], network[last] + 1]
    return found


def test_it_is_counted_and_traced_by_its_own_name(wire: Wire) -> None:
    without_default(wire).mesh()
    call(wire, REMOTE4)
    tally = wire.kernel.tables.tallies.get(wire.key)
    assert tally is not None
    assert dict(zip(TOTALS, tally.connections, strict=True))["outbound", "unreachable"] == 1


LOCAL4, LOCAL6 = "10.201.0.5", "fd77::5"


@pytest.fixture
def at_home(wire: Wire) -> Wire:
    """A pod with prefixes that are local to it by a route alone."""
    route(wire, "add", "local", "10.201.0.0/24", "dev", "lo")
    route(wire, "add", "local", "fd77::/64", "dev", "lo")
    wire.look_again()
    return wire


@pytest.mark.parametrize("target", [LOCAL4, LOCAL6, f"::ffff:{LOCAL4}"])
def test_app_calling_a_locally_routed_address_goes_direct(at_home: Wire, target: str) -> None:
    assert at_home.mesh().pod.dial(target, 8080)["who"] == "app"


@pytest.mark.parametrize("source", ["", "0.0.0.0"])
def test_proxy_calling_a_locally_routed_address_reaches_its_inbound_listener(at_home: Wire, source: str) -> None:
    seen = at_home.mesh().pod.dial(LOCAL4, 8080, source, 25300 if source else 0, uid=PROXY)
    assert (seen["who"], seen["original"], seen["peer"][0]) == ("inbound", [LOCAL4, 8080], LOCAL4)


def test_over_ipv6_it_comes_from_where_the_inbound_clusters_do(at_home: Wire) -> None:
    """The kernel chooses ::6, which lo has, so Istio's rules take it for the proxy's way to the application."""
    seen = at_home.mesh().pod.dial(LOCAL6, 8080, uid=PROXY)
    assert (seen["who"], seen["peer"][0]) == ("app", "::6")
    assert at_home.pod.dial(LOCAL6, 8080, str(at_home.pod.ip6), uid=PROXY)["who"] == "inbound"


def test_a_locally_routed_address_is_never_denied(at_home: Wire) -> None:
    at_home.mesh(CapturePolicy(dual_stack=True, deny_outbound_ports=frozenset((8080,))))
    assert at_home.pod.dial(LOCAL4, 8080)["who"] == "app"
    assert call(at_home, REMOTE4) == "EPERM"


@pytest.mark.parametrize("change", ["", "link add eth1 type bridge", "rule add from 10.9.0.2 lookup 100"])
def test_a_look_asks_for_each_table_once(wire: Wire, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    if change:
        ip_command("-n", wire.pod.path.name, *change.split())
    asked, dump = [], Rtnl._dump

    def counted(self: Rtnl, kind: int, head: bytes, limit: int) -> Dump:
        asked.append(kind)
        return dump(self, kind, head, limit)

    monkeypatch.setattr(Rtnl, "_dump", counted)
    wire.look_again()
    assert sorted(asked) == sorted((rtnl.RTM_GETADDR, rtnl.RTM_GETROUTE, rtnl.RTM_GETRULE))


def test_a_pod_with_thousands_of_addresses_is_not_asked_for_its_routes(
    make_wire: Callable[[], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = make_wire()
    asked, dump = [], Rtnl._dump
    monkeypatch.setattr(sandbox, "MAX_ADDRESSES", 4)
    ip_command("-n", wire.pod.path.name, "addr", "add", "10.9.1.1/32", "dev", "eth0")
    ip_command("-n", wire.pod.path.name, "addr", "add", "10.9.1.2/32", "dev", "eth0")

    def counted(self: Rtnl, kind: int, head: bytes, limit: int) -> Dump:
        asked.append(kind)
        return dump(self, kind, head, limit)

    monkeypatch.setattr(Rtnl, "_dump", counted)
    wire.look_again()
    assert set(asked) == {rtnl.RTM_GETADDR}


def test_a_route_to_where_istios_inbound_dials_from_is_no_way_out(wire: Wire) -> None:
    """For a moment the kernel has only this one: the address is not yet local."""
    route(wire, "add", "::6/128", "dev", "lo", "proto", "kernel")
    wire.look_again()
    assert ip_network("::6/128") not in wire.sandbox.ways
