"""Shadow pods: the programs decide for them and change nothing, so that Istio's rules capture as if nobody looked."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpf.layout import Cookie, CoverageEntry, FlowSumsEntry, ShadowSumsEntry, TallyEntry, Way
from cni.enrolment.shadows import ENDED, Shadows, described, netfilters
from cni.policy.annotations import CapturePolicy
from installer.host.captured import captured_pods
from tests.datapath.ruled import load_rules, rule, serve_all
from tests.datapath.test_dns import ASK, resolver
from tests.datapath.wires import PROXY, Kernel, Wire
from tests.lab.inside import PYTHON
from tests.lab.waiting import wait_until

POLICY = CapturePolicy(
    dual_stack=True,
    dns_capture=True,
    exclude_outbound_ports=frozenset({9090}),
    deny_outbound_ports=frozenset({9091}),
    deny_inbound_ports=frozenset({9000}),
    uncaptured="deny",
)
REFUSES = "deny_outbound_ports", "deny_inbound_ports", "uncaptured"  # what Istio does not know
ISTIOS = CapturePolicy(**{name: value for name, value in vars(POLICY).items() if name not in REFUSES})
# opens a raw socket, which a pod that wants nothing past its proxy may not
RAW = """
import json, socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    print(json.dumps("opened"))
except OSError as error:
    print(json.dumps(error.strerror))
"""
# connects, says so before it waits, and then tells what the other end has seen
PATIENT = """
import json, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
s.setblocking(False)
s.connect_ex((host, port))
print("ready", flush=True)
s.settimeout(10)
file = s.makefile()
for number, _ in enumerate(sys.stdin):
    if number:
        s.send(b"x")
    print(json.dumps({**json.loads(file.readline()), "client_peer": s.getpeername()[:2]}), flush=True)
"""


def without_ports(told: Any) -> Any:
    """What somebody has seen, without the ports that the kernel has chosen."""
    if isinstance(told, dict):
        return {name: without_ports(value) for name, value in told.items()}
    if isinstance(told, list) and len(told) == 2 and isinstance(told[1], int) and told[1] > 20000:
        return [told[0], "ephemeral"]
    return [without_ports(each) for each in told] if isinstance(told, list) else told


def traffic(wire: Wire) -> dict[str, Any]:
    """Connections of all kinds, both ways and of both families, and what each end of them has seen."""
    seen: dict[str, Any] = {}
    for family, loopback, inbound_source in (("ip4", "127.0.0.1", "127.0.0.6"), ("ip6", "::1", "::6")):
        pod, peer = getattr(wire.pod, family), getattr(wire.peer, family)
        for port in (8080, 9090, 15020, 9091, 8081):
            seen[f"app to {peer}:{port}"] = wire.pod.dial(peer, port)
            seen[f"proxy to {peer}:{port}"] = wire.pod.dial(peer, port, uid=PROXY)
        for port in (8080, 15020, 15008):
            seen[f"app to own {pod}:{port}"] = wire.pod.dial(pod, port)
            seen[f"proxy to own {pod}:{port}"] = wire.pod.dial(pod, port, uid=PROXY)
            seen[f"proxy as inbound to {pod}:{port}"] = wire.pod.dial(pod, port, inbound_source, uid=PROXY)
            seen[f"peer to {pod}:{port}"] = wire.peer.dial(pod, port, uid=0)
        for port in (9000, 8081, 15001, 15006):
            seen[f"peer to {pod}:{port}"] = wire.peer.dial(pod, port, uid=0)
        seen[f"app to {loopback}"] = wire.pod.dial(loopback, 8080)
        seen[f"proxy to {loopback}"] = wire.pod.dial(loopback, 8080, uid=PROXY)
        for how in ("connected", "unconnected"):
            for uid in (1000, PROXY):
                seen[f"{how} query of {uid} to {peer}"] = wire.pod.python(ASK, how, "", peer, uid=uid)
        seen[f"query over TCP to {peer}"] = wire.pod.python(TCP_QUERY, peer)
    seen["raw socket"] = wire.pod.python(RAW, uid=0)
    return dict(without_ports(seen))


# COUNT connections to each HOST/PORT, all open at the same time
MANY = """
import json, socket, sys
opened = []
for _ in range(int(sys.argv[1])):
    started = []
    for target in sys.argv[2:]:
        host, port = target.rsplit("/", 1)
        s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        s.setblocking(False)
        s.connect_ex((host, int(port)))
        started.append(s)
    for s in started:
        s.settimeout(10)
        s.recv(1)
    opened += started
print(json.dumps(len(opened)))
"""
TCP_QUERY = """
import json, socket, sys
with socket.create_connection((sys.argv[1], 53), 3) as s:
    print(json.dumps([json.loads(s.makefile().read()), s.getpeername()[:2]]))
"""


def ruled(wire: Wire) -> Wire:
    load_rules(wire.pod.path, ISTIOS)
    serve_all(wire)
    resolver(wire.pod, "agent", 15053, "127.0.0.1", "::1", uid=PROXY)
    resolver(wire.peer, "nameserver", 53, "0.0.0.0", "::", uid=0)
    return wire


def shadowed(wire: Wire, policy: CapturePolicy = POLICY) -> Wire:
    wire.enrol(policy)
    assert wire.kernel.enrolments.watch_only(wire.sandbox.cookie)
    return wire


def patient(wire: Wire, host: object, port: int) -> "subprocess.Popen[str]":
    return wire.pod.start([*PYTHON, PATIENT, str(host), str(port)], 1000)


def told(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return dict(json.loads(process.stdout.readline()))


def test_a_shadow_pod_with_istios_rules_behaves_as_if_nobody_looked(make_wire: Callable[[], Wire]) -> None:
    alone, shadow = make_wire(), make_wire()
    shadowed(ruled(shadow))
    assert traffic(shadow) == traffic(ruled(alone))


def test_a_shadow_pod_without_rules_is_neither_captured_nor_refused(wire: Wire) -> None:
    shadowed(wire.mesh(POLICY))
    wire.pod.serve("denied", "9000")
    for family in ("ip4", "ip6"):
        pod, peer = getattr(wire.pod, family), getattr(wire.peer, family)
        assert wire.pod.dial(peer, 8080)["who"] == "remote"
        assert "refused" in wire.pod.dial(peer, 9091)["error"]  # by the other end, where nobody listens
        assert wire.peer.dial(pod, 8080, uid=0)["who"] == "app"
        assert wire.peer.dial(pod, 9000, uid=0)["who"] == "denied"
    assert wire.pod.python(RAW, uid=0) == "opened"


def test_what_a_shadow_pod_does_is_counted_nowhere(wire: Wire) -> None:
    shadowed(ruled(wire))
    before = wire.kernel.tables.connection_totals(), wire.kernel.tables.passages(), wire.kernel.entries()
    traffic(wire)
    assert not any((wire.kernel.tables.tallies.get(wire.key) or TallyEntry()).connections)
    assert not any((wire.kernel.tables.coverage.get(wire.key) or CoverageEntry()).passages)
    assert not (wire.kernel.tables.flow_sums.get(wire.key) or FlowSumsEntry()).outbound.connections
    after = wire.kernel.tables.connection_totals(), wire.kernel.tables.passages(), wire.kernel.entries()
    assert after[:2] == before[:2]
    assert after[2]["flows"] == before[2]["flows"] and after[2]["uncaptured"] == before[2]["uncaptured"]


def test_without_the_flag_the_pod_is_captured_at_once(wire: Wire) -> None:
    """The proxy has begun to listen while the pod was a shadow."""
    shadowed(wire)
    serve_all(wire)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    assert wire.kernel.enrolments.capture_again(wire.sandbox.cookie)
    for family in ("ip4", "ip6"):
        pod, peer = getattr(wire.pod, family), getattr(wire.peer, family)
        assert wire.pod.dial(peer, 8080)["original"] == [str(peer), 8080]
        assert wire.pod.dial(peer, 8080)["who"] == "outbound"
        assert wire.peer.dial(pod, 8080, uid=0)["who"] == "inbound"


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_captured_connections_that_are_open_go_on(wire: Wire, family: str) -> None:
    wire.mesh()
    pod, peer = getattr(wire.pod, family), getattr(wire.peer, family)
    outgoing = patient(wire, peer, 8080)
    incoming = wire.peer.start([*PYTHON, PATIENT, str(pod), "8080"], 0)
    assert (told(outgoing)["who"], told(incoming)["who"]) == ("outbound", "inbound")
    wire.kernel.enrolments.watch_only(wire.sandbox.cookie)
    for _ in range(2):
        seen = told(outgoing)
        assert (seen["who"], seen["original"], seen["client_peer"]) == (
            "outbound",
            [str(peer), 8080],
            [str(peer), 8080],
        )
        seen = told(incoming)
        assert (seen["who"], seen["original"], seen["local"]) == ("inbound", [str(pod), 8080], [str(pod), 8080])
    assert wire.pod.dial(peer, 8080)["who"] == "remote"
    assert wire.peer.dial(pod, 8080, uid=0)["who"] == "app"


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_captured_connections_in_the_handshake_come_about(wire: Wire, family: str) -> None:
    wire.mesh()
    version = 4 if family == "ip4" else 6
    pod, peer = getattr(wire.pod, family), getattr(wire.peer, family)
    lost = "-p tcp --tcp-flags SYN,ACK SYN,ACK -j DROP"
    rule(wire.pod.path, f"-I OUTPUT {lost}", version=version)
    outgoing = patient(wire, peer, 8080)
    incoming = wire.peer.start([*PYTHON, PATIENT, str(pod), "8080"], 0)
    wire.kernel.enrolments.watch_only(wire.sandbox.cookie)
    rule(wire.pod.path, f"-D OUTPUT {lost}", version=version)
    seen = told(outgoing)
    assert (seen["who"], seen["original"]) == ("outbound", [str(peer), 8080])
    assert told(incoming)["who"] == "inbound"


def test_queries_on_their_way_are_answered(wire: Wire) -> None:
    """The resolver answers only after the pod has become a shadow: two nameservers, so that one has an alias."""
    wire.enrol(CapturePolicy(dual_stack=True, dns_capture=True))
    resolver_code = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 15053))
print("ready", flush=True)
for line in sys.stdin:
    data, peer = s.recvfrom(512)
    s.sendto(data, peer)
    print("answered", flush=True)
"""
    asking = """
import json, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
for server in ("10.9.0.1", "10.9.0.7"):
    s.sendto(server.encode(), (server, 53))
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([(data.decode(), list(peer)) for data, peer in (s.recvfrom(512), s.recvfrom(512))]), flush=True)
"""
    agent = wire.pod.start([*PYTHON, resolver_code], PROXY)
    client = wire.pod.start([*PYTHON, asking], 1000)
    wire.kernel.enrolments.watch_only(wire.sandbox.cookie)
    for process in (agent, agent, client):
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert client.stdout is not None
    assert json.loads(client.stdout.readline()) == [[server, [server, 53]] for server in ("10.9.0.1", "10.9.0.7")]


def test_a_shadow_pods_original_destinations_are_netfilters(wire: Wire) -> None:
    """Of both ends, and of a connection that was not redirected."""
    shadowed(ruled(wire))
    assert wire.pod.dial(wire.peer.ip4, 8080)["original"] == [str(wire.peer.ip4), 8080]
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0)["original"] == [str(wire.pod.ip4), 8080]
    assert wire.peer.dial(wire.pod.ip4, 15020, uid=0)["original"] == [str(wire.pod.ip4), 15020]


@pytest.fixture
def shadows(kernel: Kernel) -> Shadows:
    return Shadows(kernel.tables, kernel.enrolments)


def compare(shadows: Shadows, wire: Wire) -> ShadowSumsEntry:
    """Compare all that has been recorded so far."""
    wait_until(lambda: shadows.look() is not None and not shadows.tables.shadows.count(), "the records to be compared")
    sums = shadows.tables.shadow_sums.get(wire.key)
    assert sums is not None
    return sums


def findings(shadows: Shadows, cookie: int) -> set[tuple[str, str, int, str, str]]:
    return {
        (Way(key.way).name, str(key.remote.ip()), key.port, described(key.verdict, key.rule), netfilters(key.went_to))
        for key, _ in shadows.tables.findings.every()
        if key.cookie == cookie
    }


def test_netfilter_and_the_programs_do_the_same_with_traffic_of_all_kinds(wire: Wire, shadows: Shadows) -> None:
    shadowed(ruled(wire), ISTIOS)
    shadows.look()
    traffic(wire)
    sums = compare(shadows, wire)
    assert findings(shadows, wire.sandbox.cookie) == set()
    assert sums.different == 0
    assert sums.same == 58
    # what nobody answered, which conntrack forgets with the reset, and the queries of connected sockets
    assert list(sums.not_compared) == [4, 0, 0, 4, 0]


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_a_rule_that_lets_a_port_pass_is_told(wire: Wire, shadows: Shadows, family: str) -> None:
    shadowed(ruled(wire), ISTIOS)
    version, peer = (4 if family == "ip4" else 6), getattr(wire.peer, family)
    rule(wire.pod.path, "-t nat -I ISTIO_OUTPUT -p tcp --dport 8080 -j RETURN", version=version)
    shadows.look()
    assert wire.pod.dial(peer, 8080)["who"] == "remote"
    assert wire.pod.dial(peer, 8081)["who"] == "outbound"
    sums = compare(shadows, wire)
    assert (sums.same, sums.different) == (1, 1)
    told = ("OUT", str(peer), 8080, "proxy-outbound (O10)", "not redirected")
    assert findings(shadows, wire.sandbox.cookie) == {told}
    (finding,) = (value for key, value in shadows.tables.findings.every() if key.cookie == wire.sandbox.cookie)
    assert (finding.count, finding.uid) == (1, 1000)
    assert finding.command.startswith(b"python")


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_a_port_that_is_redirected_although_an_annotation_excludes_it_is_told(
    wire: Wire, shadows: Shadows, family: str
) -> None:
    shadowed(ruled(wire), ISTIOS)
    version, pod = (4 if family == "ip4" else 6), getattr(wire.pod, family)
    rule(wire.pod.path, "-t nat -D ISTIO_INBOUND -p tcp --dport 15020 -j RETURN", version=version)
    shadows.look()
    assert wire.peer.dial(pod, 15020, uid=0)["who"] == "inbound"
    assert wire.peer.dial(pod, 8080, uid=0)["who"] == "inbound"
    sums = compare(shadows, wire)
    assert (sums.same, sums.different) == (1, 1)
    told = ("IN", str(getattr(wire.peer, family)), 15020, "pass (I4)", "redirected to 15006")
    assert findings(shadows, wire.sandbox.cookie) == {told}


def test_inbound_connections_that_are_not_redirected_are_told(wire: Wire, shadows: Shadows) -> None:
    shadowed(ruled(wire), ISTIOS)
    rule(wire.pod.path, "-t nat -F ISTIO_INBOUND")
    shadows.look()
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0)["who"] == "app"
    assert compare(shadows, wire).different == 1
    told = ("IN", str(wire.peer.ip4), 8080, "proxy-inbound (I4)", "not redirected")
    assert findings(shadows, wire.sandbox.cookie) == {told}


def test_the_first_differences_of_a_pod_are_returned_once(wire: Wire, shadows: Shadows) -> None:
    shadowed(ruled(wire), ISTIOS)
    rule(wire.pod.path, "-t nat -I ISTIO_OUTPUT -p tcp --dport 8080 -j RETURN")
    shadows.look()
    for expected in (1, 0):
        wire.pod.dial(wire.peer.ip4, 8080)
        time.sleep(0.6)  # a record has to be that old
        assert len(shadows.look().get(wire.sandbox.cookie, [])) == expected


def test_many_connections_at_once_are_all_the_same(wire: Wire, shadows: Shadows) -> None:
    shadowed(ruled(wire), ISTIOS)
    shadows.look()
    peer, pod = wire.peer, wire.pod
    pod.python(MANY, 100, f"{peer.ip4}/8080", f"{peer.ip6}/8080", f"{peer.ip4}/9090", f"{pod.ip4}/8080")
    peer.python(MANY, 100, f"{pod.ip4}/8080", f"{pod.ip6}/15020", f"{pod.ip4}/8081", uid=0)
    sums = compare(shadows, wire)
    assert (sums.same, sums.different) == (700, 0)
    assert not any(sums.not_compared)


def test_connections_of_which_conntrack_knows_nothing_are_not_compared(wire: Wire, shadows: Shadows) -> None:
    shadowed(ruled(wire), ISTIOS)
    rule(wire.pod.path, "-t raw -I OUTPUT -p tcp --dport 8080 -j NOTRACK")
    rule(wire.pod.path, "-t raw -I PREROUTING -p tcp --sport 8080 -j NOTRACK")
    shadows.look()
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    sums = compare(shadows, wire)
    assert (sums.same, sums.different, list(sums.not_compared)) == (0, 0, [1, 0, 0, 0, 0])


def test_what_a_tproxy_proxy_gets_from_outside_is_not_compared(wire: Wire, shadows: Shadows) -> None:
    policy = ISTIOS.model_copy(update={"mode": "TPROXY"})
    load_rules(wire.pod.path, policy)
    serve_all(wire)
    shadowed(wire, policy)
    shadows.look()
    wire.pod.dial(wire.peer.ip4, 8080)
    wire.peer.dial(wire.pod.ip4, 15020, uid=0)
    wire.peer.dial(wire.pod.ip4, 8080, uid=0)
    sums = compare(shadows, wire)
    assert (sums.same, sums.different, list(sums.not_compared)[:3]) == (2, 0, [0, 1, 0])


def test_what_is_known_of_a_pod_outlives_it_and_another_agent(wire: Wire, shadows: Shadows, kernel: Kernel) -> None:
    shadowed(ruled(wire), ISTIOS)
    rule(wire.pod.path, "-t nat -I ISTIO_OUTPUT -p tcp --dport 8080 -j RETURN")
    shadows.look()
    ended = shadows.tables.shadow_sums.get(Cookie(ENDED)) or ShadowSumsEntry()
    wire.pod.dial(wire.peer.ip4, 8080)
    wire.pod.dial(wire.peer.ip4, 8081)
    assert compare(shadows, wire).different == 1
    another = Shadows(kernel.tables, kernel.enrolments)
    assert compare(another, wire).different == 1
    kernel.enrolments.remove(wire.sandbox.cookie)
    another.look()
    sums = kernel.tables.shadow_sums.get(Cookie(ENDED))
    assert sums is not None and (sums.same, sums.different) == (ended.same + 1, ended.different + 1)
    assert kernel.tables.shadow_sums.get(wire.key) is None
    assert not findings(another, wire.sandbox.cookie)
    assert ("OUT", str(wire.peer.ip4), 8080, "proxy-outbound (O10)", "not redirected") in findings(another, ENDED)
    kernel.tables.shadow_sums.remove(Cookie(ENDED))
    for key in list(kernel.tables.findings.every_key()):
        kernel.tables.findings.remove(key)


def test_a_shadow_pod_does_not_count_as_captured(wire: Wire, kernel: Kernel) -> None:
    wire.enrol()
    name = f"netns cookie {wire.sandbox.cookie}", "default/pod"
    assert any(each in name for each in captured_pods(kernel.pins, Path("/proc")))
    kernel.enrolments.watch_only(wire.sandbox.cookie)
    assert captured_pods(kernel.pins, Path("/proc")) == []


def test_nothing_is_recorded_of_a_pod_that_nobody_compares(wire: Wire, kernel: Kernel) -> None:
    shadowed(ruled(wire), ISTIOS)
    wire.pod.dial(wire.peer.ip4, 8080)
    wire.peer.dial(wire.pod.ip4, 8080, uid=0)
    assert not kernel.tables.shadows.count()
