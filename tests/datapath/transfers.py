"""Known numbers of bytes over one connection: `transfers.py serve PORT TAKE GIVE HOW`, `… dial HOST PORT SEND GET HOW`.

The server reads TAKE bytes, writes GIVE bytes, and closes at once if HOW is "first", else after the client. The client
writes SEND bytes and reads GET. HOW it ends: "close", "last" (after the server), "half" (its writing end first),
"reset", or "wait": it says "ready" and closes when something comes on stdin.
"""

import contextlib
import socket
import struct
import sys
import threading


def read(connection: socket.socket, length: int) -> None:
    while length:
        got = connection.recv(min(length, 1 << 16))
        assert got, f"the end came {length} bytes early"
        length -= len(got)


def answer(connection: socket.socket, take: int, give: int, how: str) -> None:
    with connection, contextlib.suppress(OSError):
        read(connection, take)
        connection.sendall(bytes(give))
        while how != "first" and connection.recv(1 << 16):
            pass


def accept(listener: socket.socket, *how: object) -> None:
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0], *how), daemon=True).start()


def serve(port: str, take: str, give: str, how: str) -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", int(port)))
        listener.listen(64)
        threading.Thread(target=accept, args=(listener, int(take), int(give), how), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


def dial(host: str, port: str, send: str, get: str, how: str) -> None:
    with socket.create_connection((host, int(port)), 10) as client:
        client.sendall(bytes(int(send)))
        read(client, int(get))
        if how == "wait":
            print("ready", flush=True)
            sys.stdin.readline()
        elif how == "half":
            client.shutdown(socket.SHUT_WR)
        elif how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how in ("half", "last"):
            assert not client.recv(1)
    print('"done"', flush=True)


if sys.argv[1] == "serve":
    serve(*sys.argv[2:])
else:
    dial(*sys.argv[2:])
