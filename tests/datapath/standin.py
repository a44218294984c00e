"""A stand-in for proxy, application and client: small enough to start by the dozen (with `python3 -I -S`).

standin.py serve NAME PORT[xN] …   N SO_REUSEPORT listeners a port and family; "close PORT i" on stdin closes one
standin.py dial HOST PORT [SOURCE [SOURCE_PORT]]
"""

import contextlib
import json
import socket
import struct
import sys
import threading

ORIGINAL_DST = 80


def original(connection: socket.socket) -> list[object] | str | None:
    try:
        if connection.family == socket.AF_INET:
            raw = connection.getsockopt(socket.SOL_IP, ORIGINAL_DST, 16)
            return [socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]]
        raw = connection.getsockopt(socket.IPPROTO_IPV6, ORIGINAL_DST, 28)
        return [socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]]
    except OSError as error:
        return error.strerror


def listen(family: int, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    listener.listen(64)
    return listener


def talk(name: str, connection: socket.socket) -> None:
    """Answer with what this end sees; then once more for every byte the client sends."""
    while True:
        seen = {
            "who": name,
            "peer": connection.getpeername()[:2],
            "local": connection.getsockname()[:2],
            "original": original(connection),
        }
        connection.sendall(json.dumps(seen).encode() + b"\n")
        if not connection.recv(1):
            connection.close()
            return


def accept(name: str, listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=talk, args=(name, listener.accept()[0]), daemon=True).start()


def serve(name: str, *ports: str) -> None:
    listeners: dict[tuple[int, int], list[socket.socket]] = {}
    for spec in ports:
        port, _, count = spec.partition("x")
        for family in (socket.AF_INET, socket.AF_INET6):
            for index in range(int(count or 1)):
                listener = listen(family, int(port))
                listeners.setdefault((int(port), index), []).append(listener)
                threading.Thread(target=accept, args=(name, listener), daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        _, closing, which = line.split()
        for listener in listeners[int(closing), int(which)]:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        print("closed", flush=True)


def dial(host: str, port: str, source: str = "", source_port: str = "0") -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(3)
    if source or source_port != "0":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((source, int(source_port)))
    try:
        client.connect((host, int(port)))
        seen = json.loads(client.makefile().readline())
    except OSError as error:
        print(json.dumps({"error": error.strerror or str(error)}))
        return
    print(json.dumps({**seen, "client_peer": client.getpeername()[:2], "client_local": client.getsockname()[:2]}))


if sys.argv[1] == "serve":
    serve(*sys.argv[2:])
else:
    dial(*sys.argv[2:])
