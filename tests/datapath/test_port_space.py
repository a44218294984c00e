"""A pod's connections are not limited by the ephemeral ports of one address, nor its bound ports by capture."""

import resource
import subprocess
from typing import Any

import pytest

from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON

# one worker: every test holds a few hundred thousand sockets
CONNECTIONS, BATCH = 110_000, 2_000  # a batch fits in the proxy's backlog

# Sockets are kept as bare descriptors. A line in is a step, a line out says that it is done and how often it went well.
HOLDER = """
import os, resource, socket, struct, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
family, held = int(sys.argv[1]), []
"""
HOLDING_PROXY = (
    HOLDER
    + """
level, size = (socket.SOL_IP, 16) if family == socket.AF_INET else (socket.IPPROTO_IPV6, 28)
originals = set()
listener = socket.socket(family)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("", 15001))
listener.listen(4096)
print("ready", flush=True)
for line in sys.stdin:
    step, count = line.split()
    if step == "accept":
        for _ in range(int(count)):
            connection = listener.accept()[0]
            originals.add(connection.getsockopt(level, 80, size))
            held.append(connection.detach())
        print(len(originals), flush=True)
    elif step == "leave":
        listener.close()
        print(0, flush=True)
    else:
        print(sum(os.write(descriptor, b"x") for descriptor in held), flush=True)
"""
)
CLIENT = (
    HOLDER
    + """
print("ready", flush=True)
for line in sys.stdin:
    step, first, count = line.split()
    if step == "connect":
        for number in range(int(first), int(first) + int(count)):
            s = socket.socket(family)
            s.settimeout(10)
            ip4 = f"11.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            s.connect((ip4 if family == socket.AF_INET else f"fd11::{number >> 16:x}:{number & 65535:x}", 80))
            s.setblocking(True)
            held.append(s.detach())
        print(len(held), flush=True)
    else:
        print(sum(os.read(descriptor, 1) == b"x" for descriptor in held), flush=True)
"""
)
TWO_FROM_ONE_PORT = """
import json, socket, sys
family, source, seen, held = int(sys.argv[1]), sys.argv[2], [], []
for host, port in zip(sys.argv[3::2], map(int, sys.argv[4::2])):
    s = socket.socket(family)
    s.settimeout(5)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((source, 5555))
    s.connect((host, port))
    held.append(s)
for s in held:
    said = json.loads(s.makefile().readline())
    seen.append([said["who"], said["peer"], said["original"], s.getsockname()[:2], s.getpeername()[:2]])
print(json.dumps(seen))
"""
IPV4, IPV6 = 2, 10


Process = subprocess.Popen[str]


def told(process: Process, step: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{step}\n")
    process.stdin.flush()


def heard(process: Process) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def held_by_a_pair(wire: Wire, family: int, first: int, count: int) -> tuple[Process, Process]:
    """A proxy and a client with `count` connections, each to an address of its own; the proxy listens no longer."""
    proxy = wire.pod.start([*PYTHON, HOLDING_PROXY, str(family)], PROXY)
    client = wire.pod.start([*PYTHON, CLIENT, str(family)], APP)
    for made in range(0, count, BATCH):
        batch = min(BATCH, count - made)
        told(proxy, f"accept {batch}")
        told(client, f"connect {first + made} {batch}")
        assert heard(client) == made + batch
        assert heard(proxy) == made + batch  # as many different original destinations
    told(proxy, "leave 0")
    assert heard(proxy) == 0
    return proxy, client


@pytest.mark.parametrize("family", [IPV4, IPV6], ids=["ip4", "ip6"])
def test_a_pod_holds_more_than_a_hundred_thousand_captured_connections(wire: Wire, family: int) -> None:
    wire.enrol()
    share = min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100)
    parts = [(first, min(share, CONNECTIONS - first)) for first in range(0, CONNECTIONS, share)]
    pairs = [held_by_a_pair(wire, family, first, count) for first, count in parts]
    for proxy, _ in pairs:
        told(proxy, "greet 0")
    assert sum(heard(proxy) for proxy, _ in pairs) == CONNECTIONS
    for _, client in pairs:
        told(client, "greeted 0 0")
    assert sum(heard(client) for _, client in pairs) == CONNECTIONS


def both_ends(wire: Wire, family: int, wildcard: bool, targets: list[tuple[str, int]]) -> Any:
    own = wire.pod.ip4 if family == IPV4 else wire.pod.ip6
    source = "" if wildcard else str(own)
    flat = [part for target in targets for part in target]
    seen = wire.pod.python(TWO_FROM_ONE_PORT, family, source, *flat)
    expected = [["outbound", [str(own), 5555], [*target], [str(own), 5555], [*target]] for target in targets]
    return seen, expected


@pytest.mark.parametrize("wildcard", [True, False], ids=["wildcard", "own-address"])
@pytest.mark.parametrize("family", [IPV4, IPV6], ids=["ip4", "ip6"])
def test_a_bound_port_reaches_two_destinations_at_once(wire: Wire, family: int, wildcard: bool) -> None:
    hosts = ("11.0.0.1", "11.0.0.2") if family == IPV4 else ("fd11::1", "fd11::2")
    seen, expected = both_ends(wire.mesh(), family, wildcard, [(host, 8080) for host in hosts])
    assert seen == expected


@pytest.mark.parametrize("wildcard", [True, False], ids=["wildcard", "own-address"])
@pytest.mark.parametrize("family", [IPV4, IPV6], ids=["ip4", "ip6"])
def test_a_bound_port_reaches_two_ports_of_a_host_at_once(wire: Wire, family: int, wildcard: bool) -> None:
    host = "11.0.0.1" if family == IPV4 else "fd11::1"
    seen, expected = both_ends(wire.mesh(), family, wildcard, [(host, 8080), (host, 9090), (host, 8081)])
    assert seen == expected
