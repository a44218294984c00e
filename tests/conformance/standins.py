"""Everything that listens in one namespace: proxy, resolver, applications, or servers. Runs as `python3 -I -S`.

Takes a JSON object: {"tcp": [[who, address, port, uid, gid, transparent, mark]…], "udp": the same}. Marks are left out
where they are 0, as `transparent` is in UDP.
Every connection is told what this end sees of it; every datagram is answered from the address it was sent to.
"""

import json
import os
import selectors
import socket
import struct
import sys
from functools import partial

ORIGINAL_DST = 80
TCPI_OPT_SYN_DATA = 32  # uapi/linux/tcp.h
IP_PKTINFO, IPV6_TRANSPARENT, IPV6_RECVPKTINFO, IPV6_FREEBIND = 8, 75, 49, 78


def opened(
    kind: int, address: str, port: int, uid: int, gid: int, transparent: bool = False, mark: int = 0
) -> socket.socket:
    """A bound socket that belongs to these ids; privileges are only borrowed away."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)
    made = socket.socket(family, kind)
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if transparent and family == socket.AF_INET:
        made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    elif transparent:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    made.bind((address, port))
    return made


def original(connection: socket.socket) -> list[object] | str:
    try:
        if connection.family == socket.AF_INET:
            raw = connection.getsockopt(socket.SOL_IP, ORIGINAL_DST, 16)
            return [socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]]
        raw = connection.getsockopt(socket.IPPROTO_IPV6, ORIGINAL_DST, 28)
        return [socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]]
    except OSError as error:
        return str(error.strerror)


def accept(who: str, worker: int, listener: socket.socket) -> None:
    connection, peer = listener.accept()
    seen = {
        "hit": who,
        "worker": worker,
        "source": peer[0],
        "source_port": peer[1],
        "original": original(connection),
        "syn_data": bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 6)[5] & TCPI_OPT_SYN_DATA),
    }
    try:
        connection.sendall(json.dumps(seen).encode() + b"\n")
        selector.register(connection, selectors.EVENT_READ, lambda: close(connection))
    except OSError:
        connection.close()


def close(connection: socket.socket) -> None:
    """The client has said all it wants: answer once more, so that data has gone both ways."""
    selector.unregister(connection)
    try:
        if connection.recv(16):
            connection.sendall(b"bye\n")
    except OSError:
        pass
    connection.close()


def answer(who: str, server: socket.socket) -> None:
    query, control, _, peer = server.recvmsg(512, 256)
    reply = json.dumps({"hit": who, "query": query.decode(), "source": peer[0]}).encode()
    if server.family == socket.AF_INET:
        _, address, _ = struct.unpack("=I4s4s", control[0][2])
        info = (socket.SOL_IP, IP_PKTINFO, struct.pack("=I4s4s", 0, address, bytes(4)))
    else:
        info = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, control[0][2][:16] + bytes(4))
    try:
        server.sendmsg([reply], [info], 0, peer)
    except OSError as error:
        print(f"{who}: {error}", file=sys.stderr)


selector = selectors.DefaultSelector()
wanted = json.loads(sys.argv[1])
for worker, (who, *how) in enumerate(wanted["tcp"]):
    listener = opened(socket.SOCK_STREAM, *how)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 64)
    listener.listen(64)
    selector.register(listener, selectors.EVENT_READ, partial(accept, who, worker, listener))
for who, *how in wanted["udp"]:
    server = opened(socket.SOCK_DGRAM, *how)
    if server.family == socket.AF_INET:
        server.setsockopt(socket.SOL_IP, IP_PKTINFO, 1)
    else:
        server.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        server.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # to answer from addresses of a whole prefix
    selector.register(server, selectors.EVENT_READ, partial(answer, who, server))
print("ready", flush=True)
while True:
    for key, _ in selector.select():
        key.data()
