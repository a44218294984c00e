"""Accelerated connections of this process with itself, captured like those of an application to its proxy."""

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

# a documentation address (RFC 5737): every connection to it is captured
_DESTINATION = ("198.51.100.1", 80)
# time limit for steps that take no time on a kernel where all is well
SECONDS = 1.0
# time for a thread to go to sleep; if it takes longer, the check tries less but does not fail
_MOMENT = 0.002


class PromiseBroken(Exception):
    """A check found that a promise of TCP is broken; the message says how."""


class NotLookedAt(Exception):
    """A check can't be made here; the message says why."""


def require(condition: bool, found: str) -> None:
    """Raise PromiseBroken with the text `found` unless the condition holds."""
    if not condition:
        raise PromiseBroken(found)


@dataclass(frozen=True)
class Pair:
    """Both ends of one connection. Blocking calls on either end raise TimeoutError after SECONDS."""

    client: socket.socket
    server: socket.socket

    @contextmanager
    def sending_later(self, message: bytes) -> Iterator[None]:
        """Send from the client in another thread after a moment, when this thread has gone to sleep."""
        sender = threading.Timer(_MOMENT, self.client.sendall, (message,))
        sender.start()
        try:
            yield
        finally:
            sender.join()


class PairBench:
    """Makes connections on a scratch node and counts what was redirected."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self.set_level(Level.FULL)

    def set_level(self, level: Level) -> None:
        """Set the scratch node's level. OFF sends later messages of open connections through TCP."""
        set_level(self._scratch.tables, NodeLevel(level, level, ""))

    @contextmanager
    def limited(self, room: int) -> Iterator[None]:
        """Limit the memory of this process's cgroup to `room` bytes more than it has. Raises NotLookedAt."""
        limit, used = (self._scratch.cgroup / f"memory.{name}" for name in ("max", "current"))
        try:
            limit.write_text(str(int(used.read_text()) + room))
        except OSError as error:
            raise NotLookedAt(f"{limit.name} of cgroup2 can't be set here: {error.strerror}") from error
        try:
            yield
        finally:
            limit.write_text("max")

    @contextmanager
    def listening(self, protocol: int = 0) -> Iterator[socket.socket]:
        """The listener that captured connections reach. Raises OSError if the kernel lacks the protocol."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("0.0.0.0", OUTBOUND_PORT))
            listener.listen()
            listener.settimeout(SECONDS)
            yield listener

    @contextmanager
    def pair(self, protocol: int = 0) -> Iterator[Pair]:
        """A new connection. TCP has carried a byte each way, so what follows may be redirected."""
        with self.unread_pair(b"1", protocol) as pair:
            receive_exactly(pair.server, 1)
            pair.server.sendall(b"2")
            receive_exactly(pair.client, 1)
            yield pair

    @contextmanager
    def unread_pair(self, early: bytes, protocol: int = 0) -> Iterator[Pair]:
        """A new connection. The client has sent `early` before the other end accepted, and nothing is read yet."""
        with ExitStack() as stack:
            listener = stack.enter_context(self.listening(protocol))
            client = stack.enter_context(socket.create_connection(_DESTINATION, SECONDS))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(early)
            server = stack.enter_context(listener.accept()[0])
            server.settimeout(SECONDS)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield Pair(client, server)

    def traffic(self) -> TrafficEntry:
        """Counters of the scratch pod's messages so far."""
        return self._scratch.tables.traffic.get(Cookie(self._scratch.cookie)) or TrafficEntry()

    @contextmanager
    def redirecting(self) -> Iterator[None]:
        """Raise PromiseBroken if nothing was redirected inside the block: the check would prove nothing."""
        before = self.traffic().redirected
        yield
        require(self.traffic().redirected > before, "nothing was redirected")


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive exactly `size` bytes. Raises PromiseBroken if they do not come."""
    got = bytearray()
    while len(got) < size:
        try:
            chunk = sock.recv(size - len(got))
        except TimeoutError:
            raise PromiseBroken(f"{len(got)} of {size} bytes came, then nothing") from None
        require(chunk != b"", f"{len(got)} of {size} bytes came, then the end")
        got += chunk
    return bytes(got)


def peek(sock: socket.socket, size: int) -> bytes:
    """What a reader that peeks sees, once it sees `size` bytes or when SECONDS are over."""
    end = time.monotonic() + SECONDS
    while True:
        got = sock.recv(size + 1, socket.MSG_PEEK)
        if len(got) >= size or time.monotonic() > end:
            return got
        time.sleep(_MOMENT)  # TCP delivers at once, but not in the sender's own call


def end_of(sock: socket.socket) -> str:
    """How a connection with nothing left to read ends: "end", "reset", "nothing", or "data" if there was more."""
    try:
        return "data" if sock.recv(1) else "end"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "nothing"


def send_until_full(sock: socket.socket, chunk: bytes, limit: int) -> int:
    """Send until the kernel makes the sender wait, `limit` bytes at most; returns how many bytes it took."""
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
    """Wait for work that the kernel delays, mainly acknowledgements."""
    time.sleep(seconds)
