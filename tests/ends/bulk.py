"""Megabytes in one direction, whose sender closes its half at once: is the reader told?

Runs as `python3 -I -S -c … serve PORT PAUSE` or `… call HOST PORT COUNT up|down PAUSE SECONDS`. A call is one
connection: a byte U or D, the size in eight bytes, and then the bytes, from the caller (U) or from the server (D). Who
has sent them closes its half; the server of D closes both. The server of U says the size of what it has read. The
caller prints how many calls ended how: "told" if the end came, "hung" if nothing came for SECONDS. Readers make a pause
of PAUSE seconds after each CHUNK bytes, so that their proxies fall behind.
"""

import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter

CHUNK = 1 << 18
LEAST, MOST = 3_000_000, 9_000_000  # bytes: some times what Envoy and the sockets hold
HEAD = struct.Struct("!cQ")
SIZE = struct.Struct("!Q")


def serve(port: int, pause: float) -> None:
    """Answer until killed."""
    with socket.create_server(("0.0.0.0", port), backlog=1000) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0], pause), daemon=True).start()


def answer(connection: socket.socket, pause: float) -> None:
    """One call."""
    with connection:
        way, size = HEAD.unpack(connection.recv(HEAD.size, socket.MSG_WAITALL))
        if way == b"D":
            connection.sendall(bytes(size))
            return
        connection.sendall(b"+")  # the inspectors have looked: an Envoy resets what ends before
        connection.sendall(SIZE.pack(drained(connection, pause)))


def drained(connection: socket.socket, pause: float) -> int:
    """How many bytes came before the end."""
    got = 0
    while data := connection.recv(CHUNK):
        if pause and (got + len(data)) // CHUNK != got // CHUNK:
            time.sleep(pause)
        got += len(data)
    return got


def call(host: str, port: int, way: str, pause: float, seconds: float) -> str:
    """How it ended."""
    size = random.randint(LEAST, MOST)
    with socket.create_connection((host, port), seconds) as connection:
        try:
            connection.sendall(HEAD.pack(way[0].upper().encode(), size))
            if way == "down":
                return "told" if drained(connection, pause) == size else "wrong"
            connection.recv(1)
            connection.sendall(bytes(size))
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(SIZE.size, socket.MSG_WAITALL)
            return "told" if said == SIZE.pack(size) else "wrong"
        except TimeoutError:
            return "hung"
        except OSError as error:
            return str(error)


def call_all(host: str, port: int, count: int, way: str, pause: float, seconds: float) -> Counter[str]:
    """So many at once."""
    found = Counter[str]()
    threads = [
        threading.Thread(target=lambda: found.update([call(host, port, way, pause, seconds)])) for _ in range(count)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    if what == "serve":
        serve(int(arguments[0]), float(arguments[1]))
    name, number, calls, direction, pause_seconds, limit = arguments
    print(json.dumps(call_all(name, int(number), int(calls), direction, float(pause_seconds), float(limit))))
