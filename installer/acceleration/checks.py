"""The promises of TCP that acceleration must keep, each checked on real sockets of this kernel."""

import errno
import fcntl
import random
import select
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from bpf.layout import Level
from installer.acceleration.pairs import (
    SECONDS,
    PairBench,
    PromiseBroken,
    end_of,
    peek,
    receive_exactly,
    require,
    send_until_full,
    wait,
)

_MPTCP = 262  # IPPROTO_MPTCP, uapi/linux/in.h
_IDLE_LIMIT = 8 << 20  # bytes that a sender may get rid of at most while nobody reads
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with time 0
_PIECES = 12  # of the first bytes: each comes as a message of its own
_WAKE_UPS = 20  # repetitions for a reader that waits already
_ROOM = 4 << 20  # bytes of memory that a limited cgroup has left, of which a receiver may not have ...
_MESSAGE = 32 << 10  # ... as many bytes (room.c)


@dataclass(frozen=True)
class Check:
    """One check. `needed` is the lowest level that needs it; OFF if no level does and level full only reports it."""

    name: str
    needed: Level
    run: Callable[[PairBench], None]


def _first_bytes(bench: PairBench) -> None:
    """Bytes sent before the other end has accepted arrive first."""
    with bench.redirecting():
        for _ in range(10):
            with bench.unread_pair(b"first") as pair:
                pair.client.sendall(b"second")
                got = receive_exactly(pair.server, 11)
                pair.client.sendall(b"third")
                got += receive_exactly(pair.server, 5)
            require(got == b"firstsecondthird", f"{got!r} instead of b'firstsecondthird'")


def _peeking(bench: PairBench) -> None:
    """A reader that peeks at the first bytes, in many pieces, finds all of them, and again after more have come."""
    pieces = [bytes([number]) * (number + 1) for number in range(_PIECES)]
    with bench.redirecting(), bench.unread_pair(pieces[0]) as pair:
        for at in range(1, _PIECES):
            pair.client.sendall(pieces[at])
            wanted = b"".join(pieces[: at + 1])
            got = peek(pair.server, len(wanted))
            require(got == wanted, f"a reader that peeks finds {len(got)} of {len(wanted)} bytes")
        receive_exactly(pair.server, sum(map(len, pieces)))
        pair.client.sendall(b"more")
        receive_exactly(pair.server, 4)


def _switches(bench: PairBench) -> None:
    """Bytes stay in order while redirection starts and stops at any moment."""
    numbers, position, expected = random.Random(1), 0, 0
    with bench.redirecting(), bench.pair() as pair:
        pair.client.setblocking(False)
        pair.server.setblocking(False)
        for step in range(600):
            if step % 7 == 0:
                bench.set_level(numbers.choice((Level.OFF, Level.FULL)))
            message = _pattern(position, numbers.choice((1, 10, 1000, 30_000)))
            with suppress(BlockingIOError):
                position += pair.client.send(message)
            if numbers.random() < 0.6 or step == 599:
                expected = _read_pattern(pair.server, expected, 20_000)
        bench.set_level(Level.FULL)
        pair.server.settimeout(1)
        while expected < position:
            expected = _read_pattern(pair.server, expected, 1 << 20)


def _read_pattern(sock: socket.socket, at: int, size: int) -> int:
    try:
        got = sock.recv(size)
    except BlockingIOError:
        return at
    except TimeoutError:
        raise PromiseBroken(f"nothing came after byte {at}") from None
    require(got == _pattern(at, len(got)), f"the wrong bytes came at byte {at}")
    return at + len(got)


def _pattern(at: int, size: int) -> bytes:
    """Bytes that show their position: each four-byte word is its own number in the stream."""
    first, last = at // 4, (at + size + 3) // 4
    words = struct.pack(f">{last - first}I", *range(first, last))
    return words[at - first * 4 :][:size]


def _back_pressure(bench: PairBench) -> None:
    """If the reader does not read, the sender stops; the reader later gets everything."""
    with bench.redirecting(), bench.pair() as pair:
        sent = send_until_full(pair.client, bytes(64 << 10), _IDLE_LIMIT)
        require(sent < _IDLE_LIMIT, f"the kernel took {sent} bytes while the reader did not read")
        receive_exactly(pair.server, sent)


def _level_triggered(bench: PairBench) -> None:
    _poll(bench, select.EPOLLIN)


def _edge_triggered(bench: PairBench) -> None:
    _poll(bench, select.EPOLLIN | select.EPOLLET)


def _poll(bench: PairBench, events: int) -> None:
    with bench.redirecting(), bench.pair() as pair, select.epoll() as epoll:
        epoll.register(pair.server, events)
        for _ in range(50):
            pair.client.sendall(b"x")
            require(bool(epoll.poll(1)), "epoll did not report data")
            receive_exactly(pair.server, 1)
        require(not epoll.poll(0), "epoll reports data that is not there")


def _blocked_reader(bench: PairBench) -> None:
    """The kernel wakes a reader that waits already."""
    with bench.redirecting(), bench.pair() as pair:
        pair.server.settimeout(None)
        for _ in range(_WAKE_UPS):
            with pair.sending_later(b"x"):
                require(_read_blocking(pair.server) == b"x", "a reader was not woken")


def _read_blocking(sock: socket.socket) -> bytes:
    """Read with a call that sleeps in the kernel, for SECONDS at most. EAGAIN means that it was woken for nothing."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(SECONDS), 0))
    try:
        return sock.recv(1)
    except BlockingIOError:
        return b""


def _blocked_poll(bench: PairBench) -> None:
    """The kernel wakes a thread that waits in epoll, level-triggered and edge-triggered."""
    for events in (select.EPOLLIN, select.EPOLLIN | select.EPOLLET):
        with bench.redirecting(), bench.pair() as pair, select.epoll() as epoll:
            epoll.register(pair.server, events)
            for _ in range(_WAKE_UPS):
                with pair.sending_later(b"x"):
                    require(bool(epoll.poll(SECONDS)), "epoll did not wake the reader")
                receive_exactly(pair.server, 1)


def _half_close(bench: PairBench) -> None:
    """An end that has shut down sending still receives."""
    with bench.redirecting(), bench.pair() as pair:
        pair.client.sendall(b"request")
        pair.client.shutdown(socket.SHUT_WR)
        require(receive_exactly(pair.server, 7) == b"request", "the request is not what was sent")
        require(end_of(pair.server) == "end", "the end of the request did not come")
        pair.server.sendall(b"reply")
        require(receive_exactly(pair.client, 5) == b"reply", "the reply is not what was sent")


def _close_after_send(bench: PairBench) -> None:
    """Bytes sent before close() arrive, then the end."""
    with bench.redirecting(), bench.pair() as pair:
        pair.client.sendall(b"x" * 50_000)
        pair.client.close()
        receive_exactly(pair.server, 50_000)
        require(end_of(pair.server) == "end", "the end did not come")


def _reset(bench: PairBench) -> None:
    """A reset reaches the other end."""
    with bench.redirecting(), bench.pair() as pair:
        pair.client.sendall(b"x")
        receive_exactly(pair.server, 1)
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        pair.client.close()
        found = end_of(pair.server)
        require(found == "reset", f"{found} instead of a reset")


def _ping_pong(bench: PairBench) -> None:
    """Small messages in turn do not wait for each other."""
    with bench.redirecting(), bench.pair() as pair:
        for _ in range(500):
            pair.client.sendall(b"ping")
            receive_exactly(pair.server, 4)
            pair.server.sendall(b"pong")
            receive_exactly(pair.client, 4)


def _mptcp_listener(bench: PairBench) -> None:
    """A Multipath TCP listener (Go's default since 1.24) serves clients that speak plain TCP."""
    try:
        with bench.pair(_MPTCP) as pair:
            pair.client.sendall(b"request")
            receive_exactly(pair.server, 7)
            pair.server.sendall(b"reply")
            receive_exactly(pair.client, 5)
    except OSError as error:
        if error.errno not in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL):
            raise


def _redirected_size(bench: PairBench) -> None:
    """FIONREAD counts redirected bytes."""
    with bench.redirecting(), bench.pair() as pair:
        pair.client.sendall(b"x" * 1000)
        _require_size(pair.server, 1000)


def _native_size(bench: PairBench) -> None:
    """FIONREAD counts bytes that came through TCP."""
    with bench.pair() as pair:
        bench.set_level(Level.OFF)
        try:
            pair.client.sendall(b"x" * 1000)
            wait(0.002)
            _require_size(pair.server, 1000)
        finally:
            bench.set_level(Level.FULL)


def _require_size(sock: socket.socket, size: int) -> None:
    (found,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    require(found == size, f"FIONREAD says {found} with {size} bytes to read")


def _short_reads(bench: PairBench) -> None:
    """A reader that stops at a short read and waits for epoll's next edge gets one for what came by TCP meanwhile."""
    with bench.redirecting(), bench.pair() as pair, select.epoll() as epoll:
        epoll.register(pair.server, select.EPOLLIN | select.EPOLLET)
        pair.client.sendall(b"past TCP")
        try:
            bench.set_level(Level.OFF)
            pair.client.sendall(b"by TCP")
            wait(0.002)
            require(bool(epoll.poll(SECONDS)), "epoll did not report data")
            got = pair.server.recv(100)
            require(len(got) == 14 or bool(epoll.poll(0.05)), "no edge comes for bytes by TCP behind redirected ones")
        finally:
            bench.set_level(Level.FULL)


def _limited_cgroup(bench: PairBench) -> None:
    """Where the receiver's cgroup is short of memory, messages go by TCP; once it is not, they are redirected."""
    message = bytes(_MESSAGE)
    with bench.pair() as pair:
        with bench.limited(_ROOM):
            before = bench.traffic().redirected
            pair.client.sendall(message)
            receive_exactly(pair.server, _MESSAGE)
            redirected = bench.traffic().redirected - before
        require(not redirected, "a message was redirected into a cgroup that has no memory left for it")
        with bench.redirecting():
            pair.client.sendall(message)
        receive_exactly(pair.server, _MESSAGE)


def _resumes(bench: PairBench) -> None:
    """A connection that used TCP for a while is redirected again."""
    with bench.pair() as pair:
        bench.set_level(Level.OFF)
        pair.client.sendall(b"through TCP")
        receive_exactly(pair.server, 11)
        bench.set_level(Level.FULL)
        with bench.redirecting():
            pair.client.sendall(b"past it")
        receive_exactly(pair.server, 7)


CHECKS = (
    Check("order of the first bytes", Level.PROXY, _first_bytes),
    Check("peeking at the first bytes", Level.PROXY, _peeking),
    Check("order across switches", Level.PROXY, _switches),
    Check("return from TCP", Level.PROXY, _resumes),
    Check("back-pressure", Level.PROXY, _back_pressure),
    Check("epoll, level-triggered", Level.PROXY, _level_triggered),
    Check("epoll, edge-triggered", Level.PROXY, _edge_triggered),
    Check("wake-up of a reader", Level.PROXY, _blocked_reader),
    Check("wake-up of epoll", Level.PROXY, _blocked_poll),
    Check("half-close", Level.PROXY, _half_close),
    Check("close after send", Level.PROXY, _close_after_send),
    Check("reset", Level.PROXY, _reset),
    Check("ping-pong", Level.PROXY, _ping_pong),
    Check("memory limit of a cgroup", Level.PROXY, _limited_cgroup),
    Check("MPTCP listener", Level.FULL, _mptcp_listener),
    Check("edge after a short read", Level.OFF, _short_reads),
    Check("FIONREAD of redirected data", Level.OFF, _redirected_size),
    Check("FIONREAD of other data", Level.OFF, _native_size),
)
