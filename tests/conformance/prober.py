"""Makes connections in one namespace as whoever it is told to be. Runs as `python3 -I -S`, as root.

Reads a JSON list of probes (see kinds.py, Probe) a line, writes the list of what was seen of each.
"""

import json
import os
import socket
import struct
import sys
from typing import Any

ORIGINAL_DST = 80
IPV6_TRANSPARENT = 75
TCP_FASTOPEN_CONNECT = 30  # uapi/linux/tcp.h
TIMEOUT = 1.5


def become(uid: int, gid: int) -> None:
    """Change the ids for the next few calls; root is kept as saved id, to come back."""
    os.setresuid(0, 0, 0)
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)


def back_to_root() -> None:
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)


def opened(probe: dict[str, Any]) -> socket.socket:
    six = probe["family"] != "4"
    become(*probe["opener"])
    made = socket.socket(
        socket.AF_INET6 if six else socket.AF_INET,
        socket.SOCK_STREAM if probe["protocol"] == "tcp" else socket.SOCK_DGRAM,
    )
    back_to_root()
    made.settimeout(TIMEOUT)
    if probe["device"]:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, probe["device"].encode())
    if probe["mark"]:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, probe["mark"])
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    if probe["source"] or probe["source_port"]:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if probe["source_port"]:  # no TIME_WAIT: another probe may use the port again
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        made.bind((probe["source"], probe["source_port"]))
    return made


def own_original(client: socket.socket) -> object:
    try:
        if client.family == socket.AF_INET:
            raw = client.getsockopt(socket.SOL_IP, ORIGINAL_DST, 16)
            return [socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]]
        raw = client.getsockopt(socket.IPPROTO_IPV6, ORIGINAL_DST, 28)
        return [socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]]
    except OSError as error:
        return error.strerror


def end(destination: list[Any]) -> tuple[Any, ...]:
    """A destination as connect() takes it: of a link-local address, Python wants the interface apart."""
    address, port = destination
    bare, _, name = address.partition("%")
    return (bare, port, 0, socket.if_nametoindex(name)) if name else (address, port)


def dial(how: str, client: socket.socket, destination: tuple[Any, ...]) -> None:
    """Connect as asked; with TCP Fast Open the first data go with the SYN."""
    if how == "fastopen-connect":
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect(destination)
        client.sendall(b"hello")
    elif how == "fastopen":
        client.setblocking(True)  # or else sendto() sends nothing as long as there is no cookie
        client.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *divmod(int(TIMEOUT * 1e6), 1_000_000))
        )
        client.sendto(b"hello", socket.MSG_FASTOPEN, destination)
        client.settimeout(TIMEOUT)
    else:
        client.connect(destination)


def connection(probe: dict[str, Any], client: socket.socket, destination: list[Any]) -> dict[str, Any]:
    """Connect, hear what the other end sees, and send something back."""
    become(*probe["connector"])
    try:
        dial(probe["how"], client, end(destination))
    finally:
        back_to_root()
    answers = client.makefile("rb")
    seen: dict[str, Any] = json.loads(answers.readline())
    seen["client_peer"] = client.getpeername()[:2]
    seen["client_local"] = client.getsockname()[0]
    seen["client_original"] = own_original(client)
    is_kept = seen.pop("source_port") == client.getsockname()[1]
    seen["is_port_kept"] = is_kept if probe["source_port"] else None
    if not probe["held"]:
        if not probe["how"].startswith("fastopen"):
            client.sendall(b"hello")
        seen["bye"] = answers.readline().decode()
    return seen


def query(probe: dict[str, Any], client: socket.socket) -> dict[str, Any]:
    """Ask every destination on one socket; a connected one asks the first."""
    become(*probe["connector"])
    seen: dict[str, Any] = {"answers": []}
    try:
        if probe["how"] == "connected":
            client.connect(tuple(probe["destinations"][0]))
            client.send(b"0")
            seen["client_peer"], seen["client_local"] = client.getpeername()[:2], client.getsockname()[0]
        else:
            for number, destination in enumerate(probe["destinations"]):
                client.sendto(str(number).encode(), tuple(destination))
        for _ in probe["destinations"]:
            data, sender = client.recvfrom(512)
            seen["answers"].append({**json.loads(data), "from": sender[:2]})
    finally:
        back_to_root()
    seen["answers"].sort(key=lambda answer: answer["query"])
    return seen


def together(probe: dict[str, Any], seen: list[dict[str, Any]]) -> dict[str, Any]:
    """One connection as it is; of several, each. Of many, whether they were spread over workers."""
    workers = {each.pop("worker") for each in seen}
    if len(seen) == 1:
        return seen[0]
    for each in seen[:-1]:  # whether there is a cookie for the first depends on the probes before
        del each["syn_data"]
    is_spread = {"is_spread": len(workers) > 1} if probe["how"] == "spread" else {}
    return {"hit": "+".join(sorted({each["hit"] for each in seen})), "each": seen, **is_spread}


def run(probe: dict[str, Any]) -> dict[str, Any]:
    clients = []
    try:
        if probe["protocol"] == "udp":
            clients.append(opened(probe))
            return query(probe, clients[0])
        seen = []
        for destination in probe["destinations"]:
            clients.append(opened(probe))
            seen.append(connection(probe, clients[-1], destination))
        return together(probe, seen)
    except TimeoutError:
        return {"hit": "timeout"}
    except OSError as error:
        return {"hit": error.strerror or str(error)}
    except ValueError:
        return {"hit": "closed without a word"}
    finally:
        for client in clients:
            client.close()


os.setgroups([])
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps([run(probe) for probe in json.loads(line)]), flush=True)
