"""What pods' connections have carried, and with whom: byte by byte, once, open or closed."""

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bpf.layout import FLOWS_PER_POD, LIFETIMES, FlowWay
from bpf.syscalls import Descriptor, open_pin
from cni.enrolment.flows import Carried, Flow, PodFlows, flows_of
from cni.enrolment.records import flow_record
from cni.policy.annotations import CapturePolicy
from installer.commands.maps.listing import kernel_says
from tests.datapath.test_tproxy import DIAL, POLICY, PROXY_GROUP
from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON
from tests.lab.waiting import wait_until

TRANSFERS = Path(__file__).with_name("transfers.py").read_text()
EXCHANGE = Path(__file__).with_name("exchange.py").read_text()
_BPF, _BPF_ENABLE_STATS = {"x86_64": 321, "aarch64": 280}[os.uname().machine], 32  # asm/unistd.h, linux/bpf.h
SENT, GIVEN = 70_001, 130_003
# how the client ends → how the server does
ENDS = {"close": "last", "last": "first", "half": "last", "reset": "last"}
DIRECT = CapturePolicy(dual_stack=True, exclude_outbound_ports=frozenset((9090,)))
# connects to so many ports of a host, where nobody answers but with a reset once it is connected
MANY = """
import json, socket, sys
host, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for port in range(first, last):
    with socket.create_connection((host, port)) as s:
        s.send(b"x")
        s.recv(1)
print(json.dumps(last - first))
"""


@contextmanager
def runs_counted() -> Iterator[None]:
    """The kernel counts runs of programs as long as the descriptor is open (BPF_ENABLE_STATS, Linux 5.8)."""
    attributes = ctypes.create_string_buffer(struct.pack("=I", 0), 4)  # BPF_STATS_RUN_TIME
    opened = ctypes.CDLL(None, use_errno=True).syscall(_BPF, _BPF_ENABLE_STATS, attributes, 4)
    assert opened >= 0, os.strerror(ctypes.get_errno())
    with Descriptor(opened):
        yield


def flows(wire: Wire) -> PodFlows:
    return flows_of(wire.kernel.pins, wire.kernel.tables, [wire.sandbox.cookie], wire.kernel.procfs.path)[
        wire.sandbox.cookie
    ]


def only(wire: Wire) -> Flow:
    found = flows(wire)
    assert not found.unseen
    assert len(found.flows) == 1, found.flows
    return found.flows[0]


def counts(carried: Carried) -> tuple[int, int, int, int]:
    return carried.open, carried.closed, carried.sent, carried.received


def place(flow: Flow) -> tuple[object, ...]:
    return flow.way, flow.address, flow.port


def serve(end: object, port: int, how: str = "last", uid: int = APP) -> None:
    argv = [*PYTHON, TRANSFERS, "serve", str(port), str(SENT), str(GIVEN), how]
    end.start(argv, uid)  # type: ignore[attr-defined]


def wait_closed(wire: Wire, number: int = 1) -> None:
    wait_until(lambda: (got := flows(wire)).outbound.closed + got.inbound.closed == number, f"{number} to be added")


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("family", ["ip4", "ip6"])
@pytest.mark.parametrize("way", [FlowWay.CAPTURED, FlowWay.DIRECT])
def test_outbound_bytes_are_exact(wire: Wire, way: FlowWay, family: str, how: str) -> None:
    wire.enrol(CapturePolicy(dual_stack=True) if way is FlowWay.CAPTURED else DIRECT)
    if way is FlowWay.CAPTURED:
        serve(wire.pod, 15001, ENDS[how], PROXY)
    else:
        serve(wire.peer, 9090, ENDS[how], 0)
    peer = getattr(wire.peer, family)
    assert wire.pod.python(TRANSFERS, "dial", peer, 9090, SENT, GIVEN, how) == "done"
    wait_closed(wire)
    found = only(wire)
    assert place(found) == (way, peer, 9090)
    assert counts(found.carried) == (0, 1, SENT, GIVEN)
    assert found.carried.rtt and found.carried.duration and found.carried.last_closed
    assert counts(flows(wire).outbound) == (0, 1, SENT, GIVEN)


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("family", ["ip4", "ip6"])
@pytest.mark.parametrize("port", [8080, 9090])
def test_inbound_bytes_are_exact(wire: Wire, port: int, family: str, how: str) -> None:
    """To 8080 by way of the proxy, to 9090 past it."""
    wire.enrol(CapturePolicy(dual_stack=True, exclude_inbound_ports=frozenset((9090,))))
    serve(wire.pod, 15006, ENDS[how], PROXY)
    serve(wire.pod, 9090, ENDS[how])
    assert wire.peer.python(TRANSFERS, "dial", getattr(wire.pod, family), port, SENT, GIVEN, how, uid=0) == "done"
    wait_closed(wire)
    found = only(wire)
    assert place(found) == (FlowWay.INBOUND, None, port)
    assert counts(found.carried) == (0, 1, GIVEN, SENT)
    assert counts(flows(wire).inbound) == (0, 1, GIVEN, SENT)


@pytest.mark.parametrize("family", ["ip4", "ip6"])
@pytest.mark.parametrize("policy", [CapturePolicy(dual_stack=True), DIRECT], ids=["captured", "direct"])
def test_an_open_connection_is_counted_when_asked_and_not_twice_after_it_closes(
    wire: Wire, policy: CapturePolicy, family: str
) -> None:
    wire.enrol(policy)
    serve(wire.pod, 15001, uid=PROXY)
    serve(wire.peer, 9090, uid=0)
    peer = getattr(wire.peer, family)
    client = wire.pod.start([*PYTHON, TRANSFERS, "dial", str(peer), "9090", str(SENT), str(GIVEN), "wait"], APP)
    for _ in range(2):
        found = only(wire)
        assert found.address == peer
        assert counts(found.carried) == counts(flows(wire).outbound) == (1, 0, SENT, GIVEN)
        assert found.carried.rtt and found.carried.duration
        assert found.carried.last_closed is None
    assert client.stdin is not None
    client.stdin.write("\n")
    client.stdin.flush()
    wait_closed(wire)
    assert counts(only(wire).carried) == (0, 1, SENT, GIVEN)


def test_an_open_inbound_connection_is_counted(wire: Wire) -> None:
    wire.enrol()
    serve(wire.pod, 15006, uid=PROXY)
    wire.peer.start([*PYTHON, TRANSFERS, "dial", str(wire.pod.ip4), "8080", str(SENT), str(GIVEN), "wait"], 0)
    assert place(only(wire)) == (FlowWay.INBOUND, None, 8080)
    assert counts(only(wire).carried) == (1, 0, GIVEN, SENT)


def test_connections_to_one_destination_are_summed(wire: Wire) -> None:
    wire.enrol()
    serve(wire.pod, 15001, uid=PROXY)
    for number in range(1, 4):
        assert wire.pod.python(TRANSFERS, "dial", wire.peer.ip4, 9090, SENT, GIVEN, "close") == "done"
        wait_closed(wire, number)
    assert counts(only(wire).carried) == (0, 3, 3 * SENT, 3 * GIVEN)


def test_a_process_that_is_killed_leaves_its_bytes(wire: Wire) -> None:
    wire.enrol()
    serve(wire.pod, 15001, uid=PROXY)
    argv = [*PYTHON, TRANSFERS, "dial", str(wire.peer.ip4), "9090", str(SENT), str(GIVEN), "wait"]
    wire.pod.end(wire.pod.start(argv, APP))
    wait_closed(wire)
    assert counts(only(wire).carried) == (0, 1, SENT, GIVEN)


def test_what_the_proxy_calls_and_what_stays_in_the_pod_is_not_counted(wire: Wire) -> None:
    wire.mesh()
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY)["who"] == "remote"
    assert wire.pod.dial(wire.pod.ip4, 8080, uid=PROXY)["who"] == "inbound"
    for host in (wire.pod.ip4, "127.0.0.1", wire.pod.ip6):
        assert wire.pod.dial(host, 8080)["who"] == "app"
    assert wire.pod.dial(wire.pod.ip4, 8080, "127.0.0.6", uid=PROXY)["who"] == "app"
    assert wire.peer.dial(wire.pod.ip4, 15020)["who"] == "app"  # pilot-agent's own port
    assert flows(wire).flows == []


def test_a_tproxy_proxys_connection_to_its_application_is_not_counted_again(wire: Wire) -> None:
    wire.enrol(POLICY)
    wire.pod.serve("inbound", "15006", uid=0, gid=PROXY_GROUP)
    wire.pod.serve("app", "8080")
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0)["who"] == "inbound"
    seen = wire.pod.python(DIAL, wire.peer.ip4, wire.pod.ip4, 8080, 1337, uid=0, gid=PROXY_GROUP)
    assert seen["who"] == "app"
    wait_closed(wire)
    assert (place(only(wire)), only(wire).carried.connections) == ((FlowWay.INBOUND, None, 8080), 1)


def test_connections_from_before_the_pod_was_enrolled_are_not_counted(wire: Wire) -> None:
    serve(wire.peer, 9090, uid=0)
    argv = [*PYTHON, TRANSFERS, "dial", str(wire.peer.ip4), "9090", str(SENT), str(GIVEN), "wait"]
    client = wire.pod.start(argv, APP)
    wire.enrol()
    assert flows(wire).flows == []
    wire.pod.end(client)
    assert flows(wire).flows == []


def many(wire: Wire, first: int, last: int) -> None:
    assert wire.pod.python(MANY, wire.peer.ip4, first, last) == last - first
    wait_until(lambda: flows(wire).outbound.open == 0, "all to be closed")


@pytest.fixture
def crowd(wire: Wire) -> Callable[[int, int], None]:
    """Connects the pod's application to as many destinations as are asked for."""
    wire.enrol()
    wire.pod.serve("outbound", "15001", uid=PROXY)
    return lambda first, last: many(wire, first, last)


def test_one_pod_has_so_many_entries_and_the_rest_is_counted(wire: Wire, crowd: Callable[[int, int], None]) -> None:
    crowd(2000, 2000 + FLOWS_PER_POD + 10)
    found = flows(wire)
    assert (len(found.flows), found.dropped) == (FLOWS_PER_POD, 10)
    assert found.outbound.closed == FLOWS_PER_POD + 10
    assert found.outbound.sent == FLOWS_PER_POD + 10


def test_the_oldest_entries_make_room(wire: Wire, crowd: Callable[[int, int], None]) -> None:
    crowd(2000, 2400)
    assert flow_record(wire.kernel.tables).forget_oldest() == 400 - FLOWS_PER_POD // 2
    crowd(3000, 3010)
    found = flows(wire)
    assert (found.forgotten, found.dropped, found.outbound.closed) == (400 - FLOWS_PER_POD // 2, 0, 410)
    ports = {each.port for each in found.flows}
    assert {2399, 3009} <= ports and 2000 not in ports


def test_a_pod_that_goes_leaves_nothing(wire: Wire) -> None:
    names = ("flows", "flow_sums", "flows_forgotten")
    empty = wire.kernel.entries()
    wire.enrol()
    serve(wire.pod, 15001, uid=PROXY)
    argv = [*PYTHON, TRANSFERS, "dial", str(wire.peer.ip4), "9090", str(SENT), str(GIVEN), "wait"]
    client = wire.pod.start(argv, APP)
    assert wire.pod.python(TRANSFERS, "dial", wire.peer.ip4, 9090, SENT, GIVEN, "close") == "done"
    wait_closed(wire)
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    wire.pod.end(client)  # one that closes later adds nothing
    after = wire.kernel.entries()
    assert {name: after[name] for name in names} == {name: empty[name] for name in names}


def test_no_program_runs_while_bytes_flow(wire: Wire) -> None:
    wire.enrol()
    wire.pod.start([*PYTHON, EXCHANGE, "serve", "15001"], PROXY)
    client = wire.pod.start([*PYTHON, EXCHANGE, str(wire.peer.ip4), "9090"], APP)
    assert client.stdin is not None and client.stdout is not None
    with runs_counted(), Descriptor(open_pin(wire.kernel.pins.programs / "sockops")) as program:
        before = kernel_says(program.fd)["run_cnt"]
        for _ in range(200):
            client.stdin.write("say something\n")
            client.stdin.flush()
            assert client.stdout.readline() == "gnihtemos\n"
        assert kernel_says(program.fd)["run_cnt"] == before
        wire.pod.end(client)
        wait_closed(wire)
        assert int(kernel_says(program.fd)["run_cnt"]) > int(before)  # it does count
    assert counts(only(wire).carried)[2:] == (200 * len("something\n"),) * 2


def test_the_node_has_sums_by_direction_and_lifetimes(wire: Wire) -> None:
    before, lived = wire.kernel.tables.flow_totals(), wire.kernel.tables.lifetimes()
    wire.enrol()
    serve(wire.pod, 15001, uid=PROXY)
    serve(wire.pod, 15006, uid=PROXY)
    assert wire.pod.python(TRANSFERS, "dial", wire.peer.ip4, 9090, SENT, GIVEN, "close") == "done"
    assert wire.peer.python(TRANSFERS, "dial", wire.pod.ip4, 8080, SENT, GIVEN, "close", uid=0) == "done"
    wait_closed(wire, 2)
    after = wire.kernel.tables.flow_totals()
    gained = {
        name: (after[name].sent - each.sent, after[name].received - each.received) for name, each in before.items()
    }
    assert gained == {"outbound": (SENT, GIVEN), "inbound": (GIVEN, SENT)}
    assert sum(wire.kernel.tables.lifetimes()) - sum(lived) == 2
    assert len(lived) == len(LIFETIMES) + 1
