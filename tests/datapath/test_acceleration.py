"""Which connections are redirected past TCP, and which never: real programs, small stand-ins for proxies and apps."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bpf import attachment, syscalls
from bpf.acceleration import NodeLevel, level_of, set_level
from bpf.attachment import attach_programs, detach_programs
from bpf.layout import LEVELS, Cookie, EndKey, Level, TrafficEntry
from bpf.loading import load_and_pin
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, entries_of
from cni.netns.plumbing import prepare
from cni.netns.sandbox import own_cookie, visit
from cni.netns.userns import outside_ids
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import APP, PROXY, Kernel, Namespace, Wire, look, scratch_pins
from tests.lab.inside import PYTHON
from tests.lab.machine import acceleration_needed
from tests.lab.objects import create_sockhash
from tests.lab.waiting import wait_until

EXCHANGE = Path(__file__).with_name("exchange.py").read_text()
MPTCP = "262"  # IPPROTO_MPTCP


class Pods:
    """Two pods of one node, joined by a cable; in each a proxy that answers by itself, and an application."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.tables = wire, wire.kernel.tables
        self.one, self.other = wire.pod, wire.peer
        self.other.cgroup = wire.kernel.cgroup
        self.cookies = {id(each): visit_cookie(each) for each in (self.one, self.other)}

    def enrol(self, pod: Namespace, policy: CapturePolicy) -> None:
        cookie = self.cookies[id(pod)]
        sandbox = look(pod.path)
        with pod.path.open() as netns:
            visit(netns.fileno(), lambda rtnl: prepare(rtnl, sandbox, True))
            ids = outside_ids(netns.fileno(), policy.proxy_uid, policy.proxy_gid)
            identity = Identity("uid", f"pod-{cookie}", "default", f"container-{cookie}", "net", "eth0")
            entries = entries_of(identity, policy, sandbox, ids)
            self.wire.kernel.enrolments.add(cookie, entries, netns.fileno())

    def start(self, pod: Namespace, app_protocol: str = "0") -> None:
        """A proxy on its two ports and an application on 8080."""
        for port in ("15001", "15006"):
            pod.start([*PYTHON, EXCHANGE, "serve", port], PROXY)
        pod.start([*PYTHON, EXCHANGE, "serve", "8080", app_protocol], APP)

    def level(self, level: Level) -> None:
        set_level(self.tables, NodeLevel(level, level, ""))

    def traffic(self, pod: Namespace) -> TrafficEntry:
        return self.tables.traffic.get(Cookie(self.cookies[id(pod)])) or TrafficEntry()

    @contextmanager
    def dialled(
        self, pod: Namespace, host: object, uid: int, *more: str, port: int = 8080, speaks: bool = True
    ) -> Iterator["Dialled"]:
        """A connection that TCP has carried a line of in both directions, unless the client does not speak."""
        process = pod.start([*PYTHON, EXCHANGE, str(host), str(port), *more], uid)
        dialled = Dialled(process)
        try:
            if speaks:
                assert dialled.say("first") == "tsrif"
            yield dialled
        finally:
            dialled.close()
            pod.end(process)


class Dialled:
    """A connection under way."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def say(self, text: str, command: str = "say") -> str:
        """Send a line, by "halve" in two messages; the reply, which should be it reversed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command} {text}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=5)


def visit_cookie(pod: Namespace) -> int:
    with pod.path.open() as netns:
        return visit(netns.fileno(), lambda _: own_cookie())


@pytest.fixture
def pods(wire: Wire) -> Iterator[Pods]:
    pods = Pods(wire)
    with acceleration_needed():
        try:
            yield pods
        finally:
            pods.level(Level.OFF)
            for cookie in pods.cookies.values():
                wire.kernel.enrolments.remove(cookie)


def both(pods: Pods, one: Level = Level.PROXY, other: Level = Level.PROXY, node: Level = Level.PROXY) -> None:
    for pod, level in ((pods.one, one), (pods.other, other)):
        pods.enrol(pod, CapturePolicy(dual_stack=True, acceleration=level))
        pods.start(pod)
    pods.level(node)


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_what_one_proxy_says_to_another_is_redirected_both_ways(pods: Pods, family: str) -> None:
    both(pods)
    with pods.dialled(pods.one, getattr(pods.other, family), PROXY) as connection:
        assert connection.say("hello") == "olleh"
        assert pods.tables.accelerated.count() == 2
        assert connection.say("again") == "niaga"
    for pod in (pods.one, pods.other):
        sums = pods.traffic(pod)
        assert (sums.redirected, sums.redirected_bytes, sums.undrained, sums.no_peer) == (2, 12, 1, 0)
    wait_until(lambda: pods.tables.accelerated.count() == 0, "closed sockets to leave")
    assert pods.tables.meetings.count() == 0


@pytest.mark.claim("exceed the node's level of acceleration")
@pytest.mark.claim("which node and Pod must both ask for")
@pytest.mark.claim("it is off unless node and Pod ask for it")
@pytest.mark.parametrize(
    ("one", "other", "node", "to_proxy", "to_app"),
    [
        ("proxy", "proxy", "off", False, False),
        ("off", "proxy", "full", False, False),
        ("proxy", "off", "full", False, False),
        ("proxy", "proxy", "full", True, False),
        ("full", "proxy", "proxy", True, False),
        ("full", "off", "full", False, True),
        ("full", "full", "full", True, True),
    ],
)
def test_the_lowest_level_counts(pods: Pods, one: str, other: str, node: str, to_proxy: bool, to_app: bool) -> None:
    both(pods, LEVELS[one], LEVELS[other], LEVELS[node])
    with pods.dialled(pods.one, pods.other.ip4, PROXY) as between_proxies:
        assert between_proxies.say("hello") == "olleh"
    assert (pods.traffic(pods.one).redirected > 0) == to_proxy
    before = pods.traffic(pods.one).redirected
    with pods.dialled(pods.one, "198.51.100.1", APP) as captured:
        assert captured.say("hello") == "olleh"
    assert (pods.traffic(pods.one).redirected > before) == to_app


def test_a_proxy_and_its_own_application_need_level_full(pods: Pods) -> None:
    both(pods, Level.FULL, node=Level.FULL)
    with pods.dialled(pods.one, pods.one.ip4, PROXY, "127.0.0.6", "0") as connection:
        assert connection.say("hello") == "olleh"
    assert pods.traffic(pods.one).redirected == 2
    pods.level(Level.PROXY)
    with pods.dialled(pods.one, pods.one.ip4, PROXY, "127.0.0.6", "0") as connection:
        assert connection.say("hello") == "olleh"
        assert pods.tables.accelerated.count() == 0
    assert pods.traffic(pods.one).redirected == 2


def test_what_leaves_the_mesh_or_the_node_is_never_in_the_map(pods: Pods) -> None:
    pods.enrol(pods.one, CapturePolicy(dual_stack=True, acceleration=Level.FULL))
    pods.start(pods.one)
    pods.other.start([*PYTHON, EXCHANGE, "serve", "8080"], APP)  # another node's pod, or none of the mesh
    pods.level(Level.FULL)
    for family in ("ip4", "ip6"):
        with pods.dialled(pods.one, getattr(pods.other, family), PROXY) as connection:
            assert connection.say("hello") == "olleh"
            assert pods.tables.accelerated.count() == 0
        with pods.dialled(pods.other, getattr(pods.one, family), APP) as connection:
            assert connection.say("hello") == "olleh"
            assert pods.tables.accelerated.count() == 0
    assert pods.tables.meetings.count() == 0


def test_an_application_that_a_proxy_reaches_directly_is_not_in_the_map(pods: Pods) -> None:
    policy = CapturePolicy(dual_stack=True, exclude_inbound_ports=frozenset((8080,)), acceleration=Level.FULL)
    both(pods, node=Level.FULL)
    pods.enrol(pods.other, policy)
    with pods.dialled(pods.one, pods.other.ip4, PROXY) as connection:
        assert connection.say("hello") == "olleh"
        assert connection.say("again") == "niaga"
        assert pods.traffic(pods.other).redirected == pods.traffic(pods.one).redirected == 0
        assert pods.tables.accelerated.count() == 0
        assert pods.tables.meetings.count() == 0


def test_equal_connections_of_two_namespaces_do_not_meet(pods: Pods) -> None:
    both(pods, Level.FULL, Level.FULL, Level.FULL)
    tuple_ = ("127.0.0.1", PROXY, "127.0.0.1", "40000")
    with pods.dialled(pods.one, *tuple_) as first, pods.dialled(pods.other, *tuple_) as second:
        for number in range(20):
            assert first.say(f"one {number}") == f"one {number}"[::-1]
            assert second.say(f"other {number}") == f"other {number}"[::-1]
    assert pods.traffic(pods.one).redirected == pods.traffic(pods.other).redirected == 40


def test_two_small_messages_at_a_time_are_redirected_however_often(pods: Pods) -> None:
    """As HTTP/2 sends headers and data: the second finds the first unread, and yet nobody is behind."""
    both(pods)
    line = "x" * 120
    with pods.dialled(pods.one, pods.other.ip4, PROXY) as connection:
        for _ in range(700):  # beyond a direction's first 64 KiB
            assert connection.say(line, "halve") == line
    sums = pods.traffic(pods.one)
    assert (sums.redirected, sums.over_budget, sums.no_peer) == (1400, 0, 0)


def test_a_level_that_changes_counts_for_connections_under_way(pods: Pods) -> None:
    both(pods)
    with pods.dialled(pods.one, pods.other.ip4, PROXY) as connection:
        assert connection.say("hello") == "olleh"
        before = pods.traffic(pods.one).redirected
        pods.level(Level.OFF)
        assert connection.say("plain") == "nialp"
        assert pods.traffic(pods.one).redirected == before == 1
        pods.level(Level.PROXY)
        assert connection.say("again") == "niaga"
        assert pods.traffic(pods.one).redirected == 2


HOLDER = """
import socket, sys
listener = socket.create_server(("0.0.0.0", 15006))
print("ready", flush=True)
connection = listener.accept()[0]
assert connection.recv(1) == b"1"
connection.sendall(b"2")
print("accepted", flush=True)
sys.stdin.readline()
connection.settimeout(3)
got = b""
while chunk := connection.recv(1 << 16):
    got += chunk
print(len(got), got == bytes(range(256)) * (len(got) // 256), flush=True)
"""
SENDER = """
import socket, sys
client = socket.create_connection((sys.argv[1], 8080))
client.sendall(b"1")
assert client.recv(1) == b"2"
client.sendall(bytes(range(256)) * 1000)
print("ready", flush=True)
sys.stdin.readline()
client.sendall(bytes(range(256)) * 1000)
client.close()
print("sent", flush=True)
"""


def test_detaching_loses_nothing_that_is_on_its_way(wire: Wire) -> None:
    with acceleration_needed(), scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        tables = Tables(pins)
        wire.kernel = Kernel(pins, cgroup, tables, Enrolments(pins, tables), wire.kernel.procfs)
        wire.pod.cgroup = cgroup
        pods = Pods(wire)
        for pod in (pods.one, pods.other):
            pods.enrol(pod, CapturePolicy(dual_stack=True))
        pods.level(Level.PROXY)
        holder = pods.other.start([*PYTHON, HOLDER], PROXY)
        sender = pods.one.start([*PYTHON, SENDER, str(pods.other.ip4)], PROXY)
        assert holder.stdout is not None and holder.stdout.readline() == "accepted\n"
        assert pods.traffic(pods.one).redirected_bytes == 256_000
        tables.close()
        assert detach_programs(pins)
        assert sender.communicate("\n", timeout=5)[0] == "sent\n"
        assert holder.communicate("\n", timeout=5)[0] == "512000 True\n"


@pytest.fixture
def cramped(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    """Two pods of a node whose socket hash has room for one end of one connection."""

    def compile_around_it(maps: Path, programs: Path) -> list[str]:
        made = create_sockhash(ctypes.sizeof(EndKey), 8, 1, "accelerated")
        with Descriptor(made) as sockets:
            syscalls.pin(sockets.fd, maps / "accelerated")
        return load_and_pin(maps, programs)

    monkeypatch.setattr(attachment, "load_and_pin", compile_around_it)
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        with Tables(pins) as tables:
            wire.kernel = Kernel(pins, cgroup, tables, Enrolments(pins, tables), wire.kernel.procfs)
            wire.pod.cgroup = cgroup
            yield Pods(wire)
        for pod in (wire.pod, wire.peer):
            pod.stop()


def test_with_a_full_map_both_ends_stay_on_tcp(cramped: Pods) -> None:
    both(cramped)
    with cramped.dialled(cramped.one, cramped.other.ip4, PROXY) as connection:
        assert connection.say("hello") == "olleh"
        assert connection.say("again") == "niaga"
        assert (cramped.tables.accelerated.count(), cramped.tables.accelerated.limit) == (0, 1)
        assert cramped.traffic(cramped.one).redirected == cramped.traffic(cramped.other).redirected == 0
        assert cramped.tables.meetings.count() == 0


@pytest.mark.parametrize(("client", "server"), [(MPTCP, "0"), ("0", MPTCP), (MPTCP, MPTCP)])
def test_multipath_tcp_is_served_and_left_alone(pods: Pods, client: str, server: str) -> None:
    pods.enrol(pods.one, CapturePolicy(dual_stack=True, acceleration=Level.FULL))
    pods.start(pods.one, app_protocol=server)
    pods.level(Level.FULL)
    with pods.dialled(pods.one, pods.one.ip4, PROXY, "127.0.0.6", "0", client) as connection:
        for number in range(5):
            assert connection.say(f"hello {number}") == f"hello {number}"[::-1]
        if client == server == MPTCP:
            assert pods.tables.accelerated.count() == pods.tables.meetings.count() == 0
            assert pods.traffic(pods.one).redirected == 0


def test_a_pod_that_is_gone_leaves_nothing(pods: Pods) -> None:
    both(pods)
    with pods.dialled(pods.one, pods.other.ip4, PROXY) as connection:
        assert connection.say("hello") == "olleh"
        for cookie in pods.cookies.values():
            pods.wire.kernel.enrolments.remove(cookie)
        assert connection.say("still here") == "ereh llits"
    wait_until(lambda: pods.tables.accelerated.count() == 0, "closed sockets to leave")
    assert [pods.tables.traffic.get(Cookie(cookie)) for cookie in pods.cookies.values()] == [None, None]


def test_a_client_that_never_speaks_leaves_nothing(pods: Pods) -> None:
    both(pods)
    with pods.dialled(pods.one, pods.other.ip4, PROXY, speaks=False):
        assert pods.tables.meetings.count() == 1
    wait_until(lambda: pods.tables.meetings.count() == 0, "the meeting to be forgotten")


def test_ipv6_that_a_pod_does_not_capture_is_its_applications(pods: Pods) -> None:
    both(pods)
    pods.enrol(pods.other, CapturePolicy(dual_stack=False))
    with pods.dialled(pods.one, pods.other.ip6, PROXY) as connection:
        assert connection.say("hello") == "olleh"
        assert pods.tables.accelerated.count() == pods.tables.meetings.count() == 0
    assert pods.traffic(pods.one).redirected == pods.traffic(pods.other).redirected == 0
    with pods.dialled(pods.one, pods.other.ip4, PROXY) as connection:
        assert connection.say("hello") == "olleh"
    assert pods.traffic(pods.one).redirected == 1


def test_the_reason_of_a_level_fits_its_field(pods: Pods) -> None:
    set_level(pods.tables, NodeLevel(Level.FULL, Level.OFF, "ä" * 300))
    assert level_of(pods.tables) == NodeLevel(Level.FULL, Level.OFF, "ä" * 123)
