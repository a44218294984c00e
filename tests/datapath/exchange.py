"""Sends lines over one connection and back: `exchange.py HOST PORT [SOURCE SOURCE_PORT]`, or `… serve PORT`.

A client reads commands from stdin: "say TEXT" sends a line and prints what comes back, "halve TEXT" sends it in two
messages, "close" ends. Servers answer each line reversed.
"""

import socket
import sys
import threading


def answer(connection: socket.socket) -> None:
    connection.settimeout(600)  # an application whose reads block gets nothing past TCP
    for line in connection.makefile():
        connection.sendall(line.strip()[::-1].encode() + b"\n")


def serve(port: str, protocol: str = "0") -> None:
    for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        listener = socket.socket(family, socket.SOCK_STREAM, int(protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((any_address, int(port)))
        listener.listen(64)
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


def accept(listener: socket.socket) -> None:
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def dial(host: str, port: str, source: str = "", source_port: str = "0", protocol: str = "0") -> None:
    client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, int(protocol))
    client.settimeout(3)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if source:
        client.bind((source, int(source_port)))
    client.connect((host, int(port)))
    replies = client.makefile()
    print("ready", flush=True)
    for line in sys.stdin:
        command, _, text = line.strip().partition(" ")
        if command == "close":
            break
        said = text.encode() + b"\n"
        half = len(said) // 2 if command == "halve" else len(said)
        for part in filter(None, (said[:half], said[half:])):
            client.sendall(part)
        print(replies.readline(), end="", flush=True)


if sys.argv[1] == "serve":
    serve(*sys.argv[2:])
else:
    dial(*sys.argv[1:])
