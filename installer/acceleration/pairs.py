"""Accelerated connections of this process with itself: captured, as an application's to its proxy are."""

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bpf.acceleration import NodeLevel, set_level
from bpf.layout import OUTBOUND_PORT, Cookie, Level, TrafficEntry
from installer.scratch import Scratch

# documentation addresses (RFC 5737, RFC 3849): every connection there is captured
_DESTINATION = ("198.51.100.1", 80)
# how long anything may take that happens at once where nothing is wrong
SECONDS = 1.0
# for a thread to go to sleep; one that does not make it is only not what was to be tried
_MOMENT = 0.002


class PromiseBroken(Exception):
    """What was found instead of what TCP promises."""


def require(condition: bool, found: str) -> None:
    """Raise CheckFailed with what was found unless the condition holds."""
    if not condition:
        raise PromiseBroken(found)


@dataclass(frozen=True)
class Pair:
    """Both ends of one connection; blocking calls of either fail with TimeoutError after SECONDS."""

    client: socket.socket
    server: socket.socket

    @contextmanager
    def sending_later(self, message: bytes) -> Iterator[None]:
        """Have the client send from another thread, in a moment: when this one has gone to sleep."""
        sender = threading.Timer(_MOMENT, self.client.sendall, (message,))
        sender.start()
        try:
            yield
        finally:
            sender.join()


class PairBench:
    """Makes connections, and knows what was redirected."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self.set_level(Level.FULL)

    def set_level(self, level: Level) -> None:
        """Of the scratch node: OFF sends messages of connections under way through TCP."""
        set_level(self._scratch.tables, NodeLevel(level, level, ""))

    @contextmanager
    def listening(self, protocol: int = 0) -> Iterator[socket.socket]:
        """Where captured connections arrive. Raises OSError where the kernel has no such protocol."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("0.0.0.0", OUTBOUND_PORT))
            listener.listen()
            listener.settimeout(SECONDS)
            yield listener

    @contextmanager
    def pair(self, protocol: int = 0, early: bytes = b"") -> Iterator[Pair]:
        """A connection; `early` is sent before the other end has accepted."""
        with ExitStack() as stack:
            listener = stack.enter_context(self.listening(protocol))
            client = stack.enter_context(socket.create_connection(_DESTINATION, SECONDS))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if early:
                client.sendall(early)
            server = stack.enter_context(listener.accept()[0])
            server.settimeout(SECONDS)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield Pair(client, server)

    def traffic(self) -> TrafficEntry:
        """What became of messages so far."""
        return self._scratch.tables.traffic.get(Cookie(self._scratch.cookie)) or TrafficEntry()

    @contextmanager
    def redirecting(self) -> Iterator[None]:
        """Raise CheckFailed when nothing was redirected meanwhile: then the check says nothing."""
        before = self.traffic().redirected
        yield
        require(self.traffic().redirected > before, "nothing was redirected")


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises CheckFailed when they do not come."""
    got = bytearray()
    while len(got) < size:
        try:
            chunk = sock.recv(size - len(got))
        except TimeoutError:
            raise PromiseBroken(f"{len(got)} of {size} bytes came, then nothing") from None
        require(chunk != b"", f"{len(got)} of {size} bytes came, then the end")
        got += chunk
    return bytes(got)


def end_of(sock: socket.socket) -> str:
    """How a connection ends that has nothing more to read: "end", "reset" or "nothing"."""
    try:
        return "data" if sock.recv(1) else "end"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "nothing"


def send_until_full(sock: socket.socket, chunk: bytes, limit: int) -> int:
    """Bytes that a sender gets rid of before the kernel has it wait for a moment; no more than `limit`."""
    sock.setblocking(False)
    sent = 0
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        while sent < limit:
            try:
                sent += sock.send(chunk)
            except BlockingIOError:
                if not selector.select(0.05):
                    break
    sock.settimeout(SECONDS)
    return sent


def wait(seconds: float) -> None:
    """Give the kernel time for what it delays, acknowledgements above all."""
    time.sleep(seconds)
