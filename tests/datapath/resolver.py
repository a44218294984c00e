"""A stand-in for the agent's resolver and for nameservers: answers every datagram and connection with what it sees.

resolver.py NAME PORT ADDRESS…
"""

import json
import socket
import sys
import threading


def reply(name: str, query: str, peer: tuple[object, ...]) -> bytes:
    return json.dumps({"who": name, "query": query, "peer": peer[:2]}).encode()


def datagrams(name: str, listener: socket.socket) -> None:
    while True:
        query, peer = listener.recvfrom(512)
        listener.sendto(reply(name, query.decode(), peer), peer)


def connections(name: str, listener: socket.socket) -> None:
    while True:
        connection, peer = listener.accept()
        with connection:
            connection.sendall(reply(name, "", peer))


name, port, addresses = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for address in addresses:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    udp, tcp = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_STREAM)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for each in (udp, tcp):
        if family == socket.AF_INET6:
            each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        each.bind((address, port))
    tcp.listen(16)
    threading.Thread(target=datagrams, args=(name, udp), daemon=True).start()
    threading.Thread(target=connections, args=(name, tcp), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
