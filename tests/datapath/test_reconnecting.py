"""A socket that is disconnected and connects again is a new connection's, whatever it was before."""

from collections.abc import Iterator

import pytest

from cni.policy.annotations import CapturePolicy
from tests.datapath.test_acceleration import EXCHANGE, Pods, both
from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON
from tests.lab.machine import acceleration_needed
from tests.lab.waiting import wait_until

# One socket all the time, told what to do with it line by line; connect() to AF_UNSPEC disconnects it (connect(2)).
SOCKET = """
import ctypes, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
sock = socket.socket()
sock.settimeout(5)
def receive():
    got = b""
    while not got.endswith(b"\\n"):
        got += sock.recv(1000)
    return got
print("ready", flush=True)
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "connect":
        sock.connect((words[0], int(words[1])))
    elif verb == "disconnect":
        assert libc.connect(sock.fileno(), bytes(16), 16) == 0
    elif verb == "begin":  # what comes first goes by TCP
        sock.sendall(b"first\\n")
        assert receive() == b"tsrif\\n"
    elif verb == "send":
        sock.sendall(words[0].encode() + b"\\n")
    elif verb == "receive":
        words = [receive().decode().strip()]
    print(*words, flush=True)
"""

# Accepts as a proxy; answers two lines of each connection and holds it, and says what else has come by then.
HOLDER = """
import socket, sys, threading
listener = socket.create_server(("0.0.0.0", 15006))
held = []
def serve():
    while True:
        connection = listener.accept()[0]
        connection.settimeout(5)
        try:
            for _ in range(2):
                line = b""
                while not line.endswith(b"\\n"):
                    line += connection.recv(1000)
                connection.sendall(line.strip()[::-1] + b"\\n")
        except OSError:  # it never speaks
            continue
        held.append(connection)
threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    more = b""
    for connection in held:
        try:
            more += connection.recv(1000, socket.MSG_DONTWAIT)
        except OSError:
            pass
    print(more.decode(), flush=True)
"""


class Told:
    """A process of a pod that does what it is told."""

    def __init__(self, process: object) -> None:
        self._process = process

    def __call__(self, text: str) -> str:
        process = self._process
        process.stdin.write(text + "\n")  # type: ignore[attr-defined]
        process.stdin.flush()  # type: ignore[attr-defined]
        return str(process.stdout.readline().strip())  # type: ignore[attr-defined]


@pytest.fixture
def pods(wire: Wire) -> Iterator[Pods]:
    pods = Pods(wire)
    both(pods)
    pods.other.stop()  # its proxy is one that holds; 9090 leads past it
    policy = CapturePolicy(dual_stack=True, exclude_inbound_ports=frozenset((9090,)))
    pods.enrol(pods.other, policy)
    pods.other.start([*PYTHON, EXCHANGE, "serve", "9090"], APP)
    try:
        with acceleration_needed():
            yield pods
    finally:
        for cookie in pods.cookies.values():
            wire.kernel.enrolments.remove(cookie)


def test_what_was_not_read_of_the_old_connection_is_not_the_new_ones(pods: Pods) -> None:
    Told(pods.other.start([*PYTHON, HOLDER], PROXY))
    sock = Told(pods.one.start([*PYTHON, SOCKET], PROXY))
    sock(f"connect {pods.other.ip4} 8080")
    sock("begin")
    sock("send old")
    wait_until(lambda: pods.traffic(pods.other).redirected == 1, "an answer that nobody reads")
    sock("disconnect")
    sock(f"connect {pods.other.ip4} 8080")
    sock("begin")
    sock("send new")
    assert sock("receive") == "wen"
    assert pods.traffic(pods.one).redirected == pods.traffic(pods.other).redirected == 2
    assert pods.tables.meetings.count() == 0


def test_connected_to_somebody_else_it_has_nothing_left_in_the_maps(pods: Pods) -> None:
    holder = Told(pods.other.start([*PYTHON, HOLDER], PROXY))
    sock = Told(pods.one.start([*PYTHON, SOCKET], PROXY))
    sock(f"connect {pods.other.ip4} 8080")
    sock("begin")
    sock("send old")
    assert sock("receive") == "dlo"
    sock("disconnect")
    sock(f"connect {pods.other.ip4} 9090")
    assert pods.tables.accelerated.count() == 1  # the holder's end of the old connection
    for number in range(3):
        sock(f"send {number}new")
        assert sock("receive") == f"wen{number}"
    assert holder("?") == ""
    assert pods.traffic(pods.one).redirected == 1
    assert pods.tables.meetings.count() == 0


def test_connected_again_and_again_it_is_redirected_and_leaves_no_meetings(pods: Pods) -> None:
    Told(pods.other.start([*PYTHON, HOLDER], PROXY))
    sock = Told(pods.one.start([*PYTHON, SOCKET], PROXY))
    for number in range(5):
        sock(f"connect {pods.other.ip4} 8080")
        if number % 2 == 0:  # else it never speaks
            sock("begin")
            sock(f"send {number}")
            assert sock("receive") == str(number)
        sock("disconnect")
    wait_until(lambda: pods.tables.meetings.count() == 0, "meetings to be forgotten")
    assert pods.traffic(pods.one).redirected == 3
    sock(f"connect {pods.other.ip4} 9090")
    assert {key.cookie for key in pods.tables.accelerated.every_key()} == {pods.cookies[id(pods.other)]}


def test_it_is_forgotten_also_where_its_pod_is_gone(pods: Pods) -> None:
    Told(pods.other.start([*PYTHON, HOLDER], PROXY))
    sock = Told(pods.one.start([*PYTHON, SOCKET], PROXY))
    sock(f"connect {pods.other.ip4} 8080")
    sock("begin")
    sock("send old")
    assert sock("receive") == "dlo"
    pods.wire.kernel.enrolments.remove(pods.cookies[id(pods.one)])
    sock("disconnect")
    sock(f"connect {pods.other.ip4} 9090")
    assert {key.cookie for key in pods.tables.accelerated.every_key()} == {pods.cookies[id(pods.other)]}
