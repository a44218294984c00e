"""Whoever reads nothing stops who writes to him, soon, at every level; and many such readers fill no memory."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bpf.layout import LEVELS
from tests.lab.inside import PYTHON
from tests.lab.istiod.sent import SERVER_FIRST
from tests.lab.levels import redirected_bytes, set_level
from tests.lab.machine import acceleration_needed, memory_for_one
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

MIB = 1 << 20
HOP = 8 * MIB  # what one connection may hold of an idle reader's data
HOLD = 2.0  # seconds without a byte accepted: it has stopped
READERS = 200
BOUND = READERS * 7 * MIB  # what docs/acceleration.md says that they hold in all at any level
# Of the pods' namespaces, so that results do not depend on the machine: the kernel's defaults (ip-sysctl.rst) ...
USUAL = ("4096 131072 6291456", "4096 16384 4194304")
# ... and little enough for 200 readers to leave the node's TCP memory (tcp_mem) to others
SMALL = ("4096 131072 1048576", "4096 16384 1048576")
PROXY_BUFFER = 32768  # bytes that Envoy itself holds: what is measured is the sockets

# Accepts and reads nothing; a line of input ends every connection.
IDLE = """
import socket, sys, threading
def end():
    for line in sys.stdin:
        while kept:
            kept.pop().close()
threading.Thread(target=end, daemon=True).start()
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=500)
kept = []
print("ready", flush=True)
while True:
    kept.append(listener.accept()[0])
    kept[-1].send(b"x")
"""

# Connections to it; each line of input is the number of those to write on until none takes any more for a while, or
# `hold`: write on all, and say what each has taken in all.
WRITER = """
import json, socket, sys, time
connections = [socket.create_connection((sys.argv[1], int(sys.argv[3]))) for _ in range(int(sys.argv[2]))]
for each in connections:
    each.recv(1)
    each.setblocking(False)
taken, some = [0] * len(connections), bytes(65536)

def write(numbers, seconds):
    last = time.monotonic()
    while time.monotonic() - last < seconds and max(taken) < 1 << 27:
        for number in numbers:
            try:
                taken[number] += connections[number].send(some)
                last = time.monotonic()
            except BlockingIOError:
                pass
        time.sleep(0.002)

print("ready", flush=True)
for line in sys.stdin:
    numbers, seconds = json.loads(line)
    write(numbers, seconds)
    print(json.dumps(taken), flush=True)
"""


@dataclass(frozen=True)
class IdleMesh(Mesh):
    """With a reader in beta that reads nothing."""

    idle: "subprocess.Popen[str]"

    def forget(self) -> None:
        """Have it close what it has accepted, which frees what it has not read."""
        assert self.idle.stdin is not None
        self.idle.stdin.write("\n")
        self.idle.stdin.flush()


@pytest.fixture(scope="module")
def mesh() -> Iterator[IdleMesh]:
    node = Node()
    node.agent.options = ["--acceleration", "off"]
    with node:
        pods = []
        for name in ("alpha", "beta"):
            pod = Pod(node, name, annotations={"sidestep.io/acceleration": "full"}, app=False)
            pod.envoy.buffer = PROXY_BUFFER
            node.pods[name] = pod
            pod.create()
            pods.append(pod)
        idle = pods[1].popen(
            [*PYTHON, IDLE, str(SERVER_FIRST)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert idle.stdout.readline() == "ready\n"
        yield IdleMesh(node, pods[0], pods[1], node.pod("gamma", mesh=False, app=False), idle)


def set_buffers(mesh: Mesh, sizes: tuple[str, str]) -> None:
    for pod in (mesh.alpha, mesh.beta):
        for name, value in zip(("tcp_rmem", "tcp_wmem"), sizes, strict=True):
            script = f"echo {value} > /proc/sys/net/ipv4/{name}"
            subprocess.run(["nsenter", f"--net={pod.netns}", "sh", "-c", script], check=True)


class Writer:
    """Connections from alpha to the idle reader in beta."""

    def __init__(self, process: Any) -> None:
        self._process = process
        assert process.stdout.readline() == "ready\n"

    def write(self, numbers: list[int], seconds: float) -> list[int]:
        """Bytes that each connection has taken so far, once none of these takes any for so long."""
        self._process.stdin.write(json.dumps([numbers, seconds]) + "\n")
        self._process.stdin.flush()
        taken: list[int] = json.loads(self._process.stdout.readline())
        return taken


@contextmanager
def writing(mesh: Mesh, count: int) -> Iterator[Writer]:
    argv = [*PYTHON, WRITER, str(mesh.beta.ip4), str(count), str(SERVER_FIRST)]
    process = mesh.alpha.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Writer(process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def standing_still(pod: Pod) -> Iterator[None]:
    """The pod's proxy, meanwhile."""
    assert pod.envoy.process is not None
    pod.envoy.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        pod.envoy.process.send_signal(signal.SIGCONT)


def tcp_memory() -> int:
    """Bytes of the whole machine's TCP buffers, redirected data included (/proc/net/sockstat, pages)."""
    line = next(line for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP:"))
    return int(line.split()[-1]) * 4096


@pytest.mark.claim("have about 512 KiB in each accelerated connection outside TCP's accounting")
@pytest.mark.parametrize("level", LEVELS)
def test_an_idle_reader_stops_its_writer(mesh: Mesh, level: str) -> None:
    set_level(mesh.node, level)
    set_buffers(mesh, USUAL)
    before = redirected_bytes(mesh.alpha)
    with acceleration_needed(), writing(mesh, 3) as writer:
        writer.write([2], 0.3)  # the application does not read: three hops fill
        with standing_still(mesh.beta):
            writer.write([1], 0.3)  # nor does the other pod's proxy: two
            with standing_still(mesh.alpha):
                writer.write([0], 0.3)  # nor its own: one
                stopped = writer.write([0, 1, 2], 0.3)
                held = writer.write([0, 1, 2], HOLD)
    assert (redirected_bytes(mesh.alpha) > before + MIB // 4) == (level != "off")
    assert held == stopped
    assert all(taken < hops * HOP for hops, taken in enumerate(held, 1)), held


@pytest.fixture
def machine() -> Iterator[None]:
    """Nobody else's, as far as TCP's memory goes."""
    with memory_for_one():
        yield


def test_two_hundred_idle_readers_hold_no_more_memory_than_over_plain_tcp(machine: None, mesh: IdleMesh) -> None:
    set_buffers(mesh, SMALL)
    used: dict[str, int] = {}
    redirected: dict[str, int] = {}
    mesh.forget()
    free = tcp_memory() + 32 * MIB
    for level in LEVELS:
        set_level(mesh.node, level)
        wait_until(lambda: tcp_memory() < free, "TCP's memory to be freed", 60)
        before, redirected_before = tcp_memory(), redirected_bytes(mesh.alpha)
        with writing(mesh, READERS) as writer:
            writer.write(list(range(READERS)), HOLD)
            used[level] = tcp_memory() - before
        redirected[level] = redirected_bytes(mesh.alpha) - redirected_before
        mesh.forget()
    print(f"bytes held by {READERS} idle readers: {used}; redirected: {redirected}")
    assert used["off"] > READERS * MIB
    assert all(each < min(BOUND, 1.25 * used["off"]) for each in used.values()), used
    assert redirected["off"] == 0
    assert min(redirected["proxy"], redirected["full"]) > READERS * MIB // 8, redirected
