"""A double of ztunnel: one process that serves pods by sockets that it opens in their network namespaces.

It does what ztunnel does with sockets, and no TLS: the marks, the ports, the way to the application with the client's
address. As a program it reads commands from stdin (serve()); in another program, use Ztunnel. It runs with the standard
library alone, as `python3 -I -S -c`, so that it can be started in any cgroup.
"""

import contextlib
import ctypes
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

MARK = 0x539  # of all of ztunnel's sockets
OUTBOUND, INBOUND, TUNNEL, RESOLVER = 15001, 15006, 15008, 15053
_ORIGINAL_DST = 80
_IP_TRANSPARENT, _IPV6_TRANSPARENT, _IP_FREEBIND = 19, 75, 15
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
Address = tuple[str, int]
Log = Callable[[dict[str, Any]], None]


class Ztunnel:
    """The proxies of all pods that it is told of.

    If `announces`, a client gets one line of JSON from it: what it has seen of the connection, and under "then" the
    first line that the other end has said, or the error. Otherwise it passes all bytes on as they are. Destinations
    whose addresses are in `tunnelled` are reached by their port 15008, with a line that names the port. `log` gets what
    it has seen of each connection before that is passed on.
    """

    def __init__(self, announces: bool = True, tunnelled: Container[str] = (), log: Log | None = None) -> None:
        self._way = _Way(announces, tunnelled, log or (lambda _: None))
        self._proxies: dict[str, _Proxy] = {}

    def add(self, uid: str, netns: int) -> None:
        """Serve a pod from now on. `netns` is a descriptor of its namespace, of which this keeps a copy.

        Raises OSError if a port can't be bound.
        """
        before = self._proxies.pop(uid, None)
        self._proxies[uid] = _Proxy(os.dup(netns), self._way)
        if before:
            before.close()

    def remove(self, uid: str) -> None:
        """Serve a pod no longer: close its listeners. Open connections go on. Nothing if it is not known."""
        proxy = self._proxies.pop(uid, None)
        if proxy:
            proxy.close()

    def close(self) -> None:
        """Serve nobody any more."""
        for uid in list(self._proxies):
            self.remove(uid)


class _Way(NamedTuple):
    """How connections are passed on."""

    announces: bool
    tunnelled: Container[str]
    log: Log


class _Netns:
    """A descriptor of a namespace. It is closed with the last that needs it: a proxy, or a connection that it took."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _Proxy:
    """The sockets of one pod."""

    def __init__(self, netns: int, way: _Way) -> None:
        self._netns, self._way = _Netns(netns), way
        self._sockets: list[socket.socket] = []
        self._servers: dict[socket.socket, Callable[[socket.socket], None]] = {}  # of those that listen
        try:
            inside(netns, self._open)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for each in self._sockets:
            if serve := self._servers.pop(each, None):
                each.setblocking(False)
                _accept(each, serve)  # what has come already: closing would reset it
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            each.close()
        self._sockets.clear()

    def _open(self) -> None:
        for port, serve in ((OUTBOUND, self._outbound), (INBOUND, self._inbound), (TUNNEL, self._tunnel)):
            self._listen("::", port, serve)
        for address in ("127.0.0.1", "::1"):
            self._listen(address, RESOLVER, self._resolve)
            asked = opened(address, socket.SOCK_DGRAM)
            self._sockets.append(asked)
            asked.bind((address, RESOLVER))
            threading.Thread(target=_answer, args=(asked,), daemon=True).start()

    def _listen(self, address: str, port: int, serve: Callable[[socket.socket], None]) -> None:
        listener = opened(address, socket.SOCK_STREAM)
        self._sockets.append(listener)
        if address == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        listener.bind((address, port))
        listener.listen(128)
        self._servers[listener] = serve
        threading.Thread(target=_accept, args=(listener, serve), daemon=True).start()

    def _outbound(self, client: socket.socket) -> None:
        """As the application asked for it; the other end sees the pod's address."""
        to = original_of(client) or _ends(client)[1]
        tunnelled = to[0] in self._way.tunnelled
        self._pass(client, "ztunnel-outbound", (to[0], TUNNEL) if tunnelled else to, "", to[1] if tunnelled else 0)

    def _inbound(self, client: socket.socket) -> None:
        """To the application, with the client's address."""
        to = original_of(client) or _ends(client)[1]
        if to[1] in (OUTBOUND, INBOUND, TUNNEL):  # it would come back here
            client.close()
            return
        self._pass(client, "ztunnel-inbound", to, _ends(client)[0][0])

    def _tunnel(self, client: socket.socket) -> None:
        """The same; the first line says which port."""
        line = b""
        while not line.endswith(b"\n"):
            if not (byte := client.recv(1)):
                return
            line += byte
        peer, local = _ends(client)
        self._pass(client, "ztunnel-tunnel", (local[0], int(line)), peer[0])

    def _resolve(self, client: socket.socket) -> None:
        client.sendall(json.dumps({"who": "ztunnel-dns", **_seen(client)}).encode() + b"\n")

    def _pass(self, client: socket.socket, who: str, to: Address, source: str, tunnelled_port: int = 0) -> None:
        seen: dict[str, Any] = {"who": who, **_seen(client)}
        self._way.log({**seen, "to": to})
        try:
            upstream = inside(self._netns.fd, lambda: dialled(to, source))
            if tunnelled_port:
                upstream.sendall(f"{tunnelled_port}\n".encode())
        except OSError as error:
            why = {"error": error.strerror or str(error)}
            self._way.log({**seen, "who": "error", "of": who, "to": to, **why})
            if self._way.announces:
                _say(client, {**seen, "then": why})
            return
        with upstream:
            if self._way.announces:
                first = upstream.makefile("rb", buffering=0).readline()
                _say(client, {**seen, "then": json.loads(first) if first else None})
            try:
                _relay(client, upstream)
            except OSError as error:
                self._way.log({**seen, "who": "error", "of": who, "to": to, "error": error.strerror or str(error)})


def inside(netns: int, work: Callable[[], T]) -> T:
    """Run `work` in a network namespace, in a thread of its own. Returns or raises what it does."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            if _LIBC.setns(netns, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure.pop()  # left in the list, it would keep this frame, and all that is in it, alive
    return outcome[0]


def opened(address: str, kind: int) -> socket.socket:
    """A socket of ztunnel's, marked before it is bound."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made


def dialled(to: Address, source: str = "") -> socket.socket:
    """A connection to an address, from `source` unless that is the destination's own address."""
    made = opened(to[0], socket.SOCK_STREAM)
    try:
        made.settimeout(3)
        if source and source != to[0]:
            six = made.family == socket.AF_INET6
            made.setsockopt(*((socket.IPPROTO_IPV6, _IPV6_TRANSPARENT) if six else (socket.SOL_IP, _IP_TRANSPARENT)), 1)
            made.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
            made.bind((source, 0))
        made.connect(to)
        made.settimeout(None)
    except BaseException:
        made.close()
        raise
    return made


def original_of(connection: socket.socket) -> Address | None:
    """What SO_ORIGINAL_DST says, asked as ztunnel asks: of IPv4, then of IPv6. None if there is no answer."""
    with contextlib.suppress(OSError):
        raw = connection.getsockopt(socket.SOL_IP, _ORIGINAL_DST, 16)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]
    with contextlib.suppress(OSError):
        raw = connection.getsockopt(socket.IPPROTO_IPV6, _ORIGINAL_DST, 28)
        return socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]
    return None


def _ends(connection: socket.socket) -> tuple[Address, Address]:
    """Peer and local address; IPv4 as such."""
    names = (connection.getpeername(), connection.getsockname())
    peer, local = ((name[0].removeprefix("::ffff:"), name[1]) for name in names)
    return peer, local


def _seen(connection: socket.socket) -> dict[str, Any]:
    peer, local = _ends(connection)
    return {"pid": os.getpid(), "peer": peer, "local": local, "original": original_of(connection)}


def _say(client: socket.socket, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        client.sendall(json.dumps(what).encode() + b"\n")


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    def attend(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            serve(client)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=attend, args=(listener.accept()[0],), daemon=True).start()


def _answer(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            query, peer = server.recvfrom(512)
            if peer is None:  # the socket has been closed
                return
            said = {"who": "ztunnel-dns", "query": query.decode(), "peer": peer[:2]}
            server.sendto(json.dumps(said).encode(), peer)


def _relay(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes on both ways until both ends have ended."""
    selector = selectors.DefaultSelector()
    for end, target in ((one, other), (other, one)):
        selector.register(end, selectors.EVENT_READ, target)
    while selector.get_map():
        for key, _ in selector.select():
            source: Any = key.fileobj
            chunk = source.recv(65536)
            if chunk:
                key.data.sendall(chunk)
                continue
            selector.unregister(source)
            with contextlib.suppress(OSError):
                key.data.shutdown(socket.SHUT_WR)


def serve(*tunnelled: str) -> None:
    """Follow commands from stdin, a line each: "add UID NETNS", "remove UID". Each is answered by "ok" or an error."""
    ztunnel = Ztunnel(tunnelled=tunnelled)
    print("ready", flush=True)
    for line in sys.stdin:
        command, uid, *rest = line.split()
        try:
            if command == "add":
                netns = os.open(rest[0], os.O_RDONLY)
                try:
                    ztunnel.add(uid, netns)
                finally:
                    os.close(netns)
            else:
                ztunnel.remove(uid)
        except OSError as error:
            print(error.strerror, flush=True)
        else:
            print("ok", flush=True)


class Told:
    """The double in a process of its own, as it is told what to do; `start` starts its command in ztunnel's cgroup."""

    def __init__(self, start: Callable[[list[str]], "subprocess.Popen[str]"], *tunnelled: str) -> None:
        interpreter = str(Path(sys.executable).resolve())
        self._process = start([interpreter, "-I", "-S", "-c", Path(__file__).read_text(), *tunnelled])
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def add(self, uid: str, netns: object) -> str:
        """Have it serve the pod of a namespace, given by its path; returns "ok" or an error."""
        return self._tell(f"add {uid} {netns}")

    def remove(self, uid: str) -> str:
        """Have it serve a pod no longer."""
        return self._tell(f"remove {uid}")

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()

    def _tell(self, command: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


if __name__ == "__main__":
    serve(*sys.argv[1:])
