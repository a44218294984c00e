"""The clients of the faults, one round each; what they saw is printed as JSON (`python3 -I -S`).

client.py halves HOST PORT EACH SECONDS      connections whose one half has ended, used again after SECONDS
client.py again HOST PORT SOURCE_PORT …      new connections from these source ports
client.py burst HOST PORT COUNT              that many connections at a time
client.py pairs HOST PORT PORT BASE COUNT    two connections from each source port of a range, to two ports
"""

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

PATIENCE = 3.0  # seconds: two retransmitted SYNs
AT_ONCE = 0.5  # seconds: the first SYN is sent again after one
SAID = b"x" * 1000

Given = TypeVar("Given")
Answer = TypeVar("Answer")


def halves(host: str, port: str, each: str, seconds: str) -> object:
    """Some that close, some that say more and close, and some that wait for the answer after they have closed."""

    def opened(kind: bytes) -> list[socket.socket]:
        made = [socket.create_connection((host, int(port)), 5) for _ in range(int(each))]
        for connection in made:
            connection.sendall(kind)
        return made

    closing, saying, hearing = map(opened, (b"c", b"s", b"h"))
    for connection in closing + saying:
        assert connection.recv(100) == b""
    for connection in hearing:
        connection.shutdown(socket.SHUT_WR)
    time.sleep(float(seconds))
    ports = [connection.getsockname()[1] for connection in closing]
    for connection in saying:
        with contextlib.suppress(OSError):
            connection.sendall(SAID)
    for connection in closing + saying:
        connection.close()
    deadline = time.monotonic() + PATIENCE
    heard = sum(_until_end(connection, deadline) for connection in hearing)
    return {"ports": ports, "heard": heard}


def _until_end(connection: socket.socket, deadline: float) -> int:
    count = 0
    with contextlib.suppress(OSError):
        while True:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            data = connection.recv(65536)
            if not data:
                break
            count += len(data)
    return count


def again(host: str, port: str, *sources: str) -> object:
    """How many are answered before a first SYN would be sent again."""

    def ask(source: str) -> bool:
        started = time.monotonic()
        with _bound(int(source)) as connection, contextlib.suppress(OSError):
            connection.connect((host, int(port)))
            connection.sendall(b"n")
            return connection.recv(100) != b"" and time.monotonic() - started < AT_ONCE
        return False

    return sum(_all(ask, sources))


def burst(host: str, port: str, count: str) -> object:
    """How many are answered. All are open at the same time; the client ends them."""
    made = []
    answered = 0
    deadline = time.monotonic() + PATIENCE
    for _ in range(int(count)):
        with contextlib.suppress(OSError):
            made.append(socket.create_connection((host, int(port)), max(0.01, deadline - time.monotonic())))
    for connection in made:
        connection.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            answered += connection.makefile().readline().endswith("\n")
    for connection in made:
        connection.close()
    return answered


def pairs(host: str, first: str, second: str, base: str, count: str) -> object:
    """How many of a pair's two connections are answered for the right port, and how many kept their source port."""
    gate = threading.Barrier(int(count))

    def ask(source: int) -> tuple[int, int]:
        right = kept = 0
        with contextlib.ExitStack() as stack:
            for port in (int(first), int(second)):
                connection = stack.enter_context(_bound(source))
                with contextlib.suppress(OSError):
                    connection.connect((host, port))
                    seen = json.loads(connection.makefile().readline())
                    right += seen["port"] == port
                    kept += seen["from"] == source
            gate.wait()  # nobody closes while others have still to connect
        return right, kept

    answers = _all(ask, range(int(base), int(base) + int(count)))
    return {"right": sum(right for right, _ in answers), "kept": sum(kept for _, kept in answers)}


def _bound(source: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.settimeout(PATIENCE)
    connection.bind(("", source))
    return connection


def _all(ask: Callable[[Given], Answer], given: Iterable[Given]) -> list[Answer]:
    """Ask at the same time."""
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(ask, given))


if __name__ == "__main__":
    chosen = {each.__name__: each for each in (halves, again, burst, pairs)}[sys.argv[1]]
    print(json.dumps(chosen(*sys.argv[2:])))
