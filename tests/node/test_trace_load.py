"""`sidestep trace` of as much as there is: all of it is told or counted as lost, and it ends when it is asked to."""

import ctypes
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpf import syscalls
from bpf.kernel import possible_cpus
from bpf.layout import TracingEntry, Word
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from tests.lab.command import tracing
from tests.lab.inside import PYTHON
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

LIMIT = 60

FLOOD = """
import socket
while True:
    s = socket.socket()
    s.connect_ex(("198.51.100.1", 7))
    s.close()
"""


@contextmanager
def flooded(node: Node, name: str) -> Iterator[None]:
    """A pod makes events as fast as it can."""
    pod = node.pod(name, annotations={"sidestep.io/deny-outbound-ports": "7"}, app=False, envoy=False)
    flood = pod.popen(["python3", "-I", "-S", "-c", FLOOD])
    try:
        yield
    finally:
        flood.kill()
        flood.wait()
        pod.stop()


def test_interrupted_under_load_it_ends_without_a_word(mesh: Mesh, tmp_path: Path) -> None:
    with flooded(mesh.node, "flood"):
        file = tmp_path / "events"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            with (
                file.open("w") as output,
                tracing(mesh.node, "--verdict", "denied", "--output", "json", output=output) as trace,
            ):
                wait_until(lambda: file.stat().st_size > 1_000_000, "events", LIMIT)
                trace.send_signal(number)
                said = trace.communicate(timeout=LIMIT)[1]
            assert trace.returncode == 0
            *losses, last = said.splitlines()
            assert all("events lost" in line for line in losses), said
            assert last.startswith("traced: ")
            assert all(json.loads(line)["event"] in ("connect", "lost") for line in file.open())


@pytest.mark.claim("traffic never waits")
def test_events_are_made_as_long_as_it_runs_be_the_reader_as_slow_as_he_may(mesh: Mesh) -> None:
    pins = Pins(mesh.node.bpffs)
    with (
        flooded(mesh.node, "flood4"),
        tracing(mesh.node, "--verdict", "denied") as trace,
        Descriptor(pins.open_map("lost")) as lost,
    ):
        before = count_of(lost)
        time.sleep(5)  # longer than an interest lasts; nobody reads, so the pipe is full and the trace waits
        assert trace.poll() is None
        after = count_of(lost)
        assert after > before
        wait_until(lambda: count_of(lost) > after, "events to be lost still", LIMIT)


def count_of(lost: Descriptor) -> int:
    row = (ctypes.c_uint64 * possible_cpus())()
    syscalls.map_lookup(lost.fd, Word(0), row)
    return sum(row)


@pytest.mark.claim("others' events are lost then, and counted")
def test_what_is_lost_is_counted_in_the_stream_and_beside_it(mesh: Mesh, tmp_path: Path) -> None:
    file = tmp_path / "events"
    with (
        flooded(mesh.node, "flood3"),
        file.open("w") as output,
        tracing(mesh.node, "--verdict", "denied", "--output", "json", output=output) as trace,
    ):
        trace.send_signal(signal.SIGSTOP)
        pins = Pins(mesh.node.bpffs)
        with Descriptor(pins.open_map("tracing")) as interest, Descriptor(pins.open_map("lost")) as lost:
            until = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + LIMIT * 1_000_000_000
            assert syscalls.map_update(interest.fd, Word(0), TracingEntry(until, 0)) == 0
            before = count_of(lost)
            wait_until(lambda: count_of(lost) > before, "events to be lost", LIMIT)
        trace.send_signal(signal.SIGCONT)
        trace.send_signal(signal.SIGINT)
        said = trace.communicate(timeout=LIMIT)[1]
    counts = [each["count"] for each in map(json.loads, file.open()) if each["event"] == "lost"]
    lines = [f"sidestep: {count} events lost; no connection waited for them" for count in counts]
    *told, last = said.splitlines()
    assert told == lines
    assert last.startswith("traced: ") and last.endswith(f", {sum(counts)} lost")
    assert counts and all(each > 0 for each in counts)


def test_it_does_not_wait_for_a_reader_that_does_not_read(mesh: Mesh) -> None:
    with flooded(mesh.node, "flood2"), tracing(mesh.node, "--verdict", "denied") as trace:
        assert trace.stdout is not None
        trace.stdout.readline()
        time.sleep(0.5)

        def has_ended() -> bool:
            trace.send_signal(signal.SIGINT)
            time.sleep(0.3)
            return trace.poll() is not None

        wait_until(has_ended, "the trace to end", LIMIT)
        assert trace.stderr is not None
        said = trace.stderr.read()
    *losses, last = said.splitlines()
    assert all("events lost" in line for line in losses), said
    assert last.startswith("traced: ")


# Prints how many ended as they should, and the seconds that it took.
CONNECTS = """
import errno, json, socket, struct, sys, time
count, per_second, port, expected = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(errno, sys.argv[4], 0)
reset = struct.pack("ii", 1, 0)
begun, right = time.monotonic(), 0
for number in range(count):
    if number % 100 == 0:
        time.sleep(max(0.0, begun + number / per_second - time.monotonic()))
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    right += s.connect_ex((f"198.51.100.{number % 250 + 1}", port)) == expected
    s.close()
print(json.dumps([right, time.monotonic() - begun]))
"""

STAND_IN = """
import contextlib, socket
listener = socket.socket()
listener.bind(("0.0.0.0", 15001))
listener.listen(4096)
print("ready", flush=True)
while True:
    with contextlib.suppress(OSError):
        listener.accept()[0].close()
"""


def burst(pod: Pod, file: Path, verdict: str, *how: object) -> tuple[list[dict[str, Any]], int, float]:
    """What a trace tells of connections that are made as CONNECTS is asked to, how many it says were lost, and how many
    a second there were. All are told or counted."""
    count = int(str(how[0]))
    with (
        file.open("w") as output,
        tracing(pod.node, pod.name, "--verdict", verdict, "--output", "json", output=output) as trace,
    ):
        client = pod.popen([*PYTHON, CONNECTS, *map(str, how)], stdout=subprocess.PIPE, text=True)
        right, seconds = json.loads(client.communicate(timeout=LIMIT)[0])
        trace.send_signal(signal.SIGINT)
        said = trace.communicate(timeout=LIMIT)[1]
    assert (right, trace.returncode) == (count, 0)
    events = [json.loads(line) for line in file.open()]
    lost = sum(each["count"] for each in events if each["event"] == "lost")
    assert said.endswith(f"traced: {count - lost} events, {lost} lost\n"), said
    assert ("no connection waited" in said) == bool(lost), said
    told = [each for each in events if each["event"] != "lost"]
    assert len(told) + lost == count
    return told, lost, count / seconds


def test_ten_thousand_connections_a_second_are_all_told(node: Node, tmp_path: Path) -> None:
    pod = node.pod("alpha", annotations={"sidestep.io/deny-outbound-ports": "7"}, app=False, envoy=False)
    tries: list[tuple[float, int]] = []
    # others may use the machine as well: then connections come slower, or the reader has no processor for a second
    while not any(rate >= 10_000 and not lost for rate, lost in tries):
        assert len(tries) < 20, f"connections a second, events lost: {tries}"
        events, lost, rate = burst(pod, tmp_path / "events", "denied", 36_000, 12_000, 7, "EPERM")
        tries.append((rate, lost))
    assert {(each["event"], each["verdict"]) for each in events} == {("connect", "denied")}


def test_captured_connections_are_all_told_as_fast_as_they_come(node: Node, tmp_path: Path) -> None:
    pod = node.pod("alpha", app=False, envoy=False)
    with pod.popen([*PYTHON, STAND_IN], uid=1337, stdout=subprocess.PIPE) as proxy:
        try:
            assert proxy.stdout.readline() == b"ready\n"
            for _ in range(5):  # as above
                events, lost, _ = burst(pod, tmp_path / "events", "captured", 40_000, 1_000_000, 80, "none")
                if not lost:
                    break
        finally:
            proxy.kill()
    assert not lost
    assert {(each["event"], each["rule"], each["listener"]) for each in events} == {("connect", "O10", 15001)}
    assert len({each["destination"] for each in events}) == 250
