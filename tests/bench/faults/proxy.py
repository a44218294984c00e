"""A stand-in for Envoy in one pod: asks for the original destination, and relays or answers (`python3 -I -S`).

proxy.py PORT RELAYED   Connections to the original port RELAYED are passed on, in both directions, each end by itself.
                        All others are answered with the original port and the client's port as JSON.
"""

import contextlib
import json
import socket
import struct
import sys
import threading

ORIGINAL_DST = 80


def original(connection: socket.socket) -> tuple[str, int]:
    raw = connection.getsockopt(socket.SOL_IP, ORIGINAL_DST, 16)
    return socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]


def pass_on(reader: socket.socket, writer: socket.socket) -> None:
    """Bytes and then the end, as Envoy's tcp_proxy does: the other direction stays open."""
    with contextlib.suppress(OSError):
        while data := reader.recv(65536):
            writer.sendall(data)
        writer.shutdown(socket.SHUT_WR)


def relay(near: socket.socket, destination: tuple[str, int]) -> None:
    with near, socket.create_connection(destination, 5) as far:
        far.settimeout(None)
        back = threading.Thread(target=pass_on, args=(far, near), daemon=True)
        back.start()
        pass_on(near, far)
        back.join()


def answer(connection: socket.socket, port: int) -> None:
    """Stays until the client has ended the connection, which so has TIME_WAIT on its side."""
    with connection, contextlib.suppress(OSError):
        seen = {"port": port, "from": connection.getpeername()[1]}
        connection.sendall(json.dumps(seen).encode() + b"\n")
        connection.recv(1)


def serve(port: int, relayed: int) -> None:
    listener = socket.create_server(("0.0.0.0", port), backlog=1024)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):
            destination = original(connection)
            target, args = (relay, destination) if destination[1] == relayed else (answer, destination[1])
            threading.Thread(target=target, args=(connection, args), daemon=True).start()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
