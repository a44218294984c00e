"""What an application notices of its connection with its own proxy: run as `-m tests.datapath.applying CGROUP`.

Prints what each case has seen over plain TCP and at level full. Both ends are this process, `proxy` the accepting one.
"""

import ctypes
import errno
import json
import os
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

from bpf.layout import Level
from cni.policy.annotations import CapturePolicy
from installer.acceleration.pairs import Pair, PairBench, end_of, receive_exactly
from installer.scratch import scratch_node

MESSAGE = bytes(range(250)) * 4
SO_ZEROCOPY, MSG_ZEROCOPY, MSG_ERRQUEUE = 60, 0x4000000, 0x2000
SO_TIMESTAMP, SO_PEEK_OFF, ETH_P_ALL = 29, 42, 3  # uapi/asm-generic/socket.h, linux/if_ether.h
TCP_INQ = TCP_CM_INQ = 36  # uapi/linux/tcp.h
_LIBC = ctypes.CDLL(None, use_errno=True)
BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in struct tcp_info (uapi/linux/tcp.h)
WHOLE = bytes(range(256)) * 256


def low_water(application: socket.socket, proxy: socket.socket) -> object:
    """Whether less than SO_RCVLOWAT wakes poll()."""
    application.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
    proxy.sendall(b"0123456789")
    return bool(_poll(application))


def zero_copy(application: socket.socket, proxy: socket.socket) -> object:
    """Whether the notification of MSG_ZEROCOPY comes after the data have."""
    proxy.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    proxy.send(MESSAGE, MSG_ZEROCOPY)
    assert receive_exactly(application, len(MESSAGE)) == MESSAGE
    return bool(_poll(proxy, 0, 200))


def tcp_info(application: socket.socket, proxy: socket.socket) -> object:
    """What of 1000 bytes TCP_INFO says has been received."""
    before = _received(application)
    proxy.sendall(MESSAGE)
    receive_exactly(application, 1000)
    return _received(application) - before


def unsent(application: socket.socket, proxy: socket.socket) -> object:
    """Whether SIOCOUTQ counts what the application has not acknowledged, its proxy having sent all that goes."""
    proxy.setblocking(False)
    with suppress(BlockingIOError):
        for _ in range(6):
            proxy.send(bytes(64 << 10))
    (waiting,) = struct.unpack("i", ioctl(proxy, termios.TIOCOUTQ, bytes(4)))
    return waiting > 0


def close_unread(application: socket.socket, proxy: socket.socket) -> object:
    """How the proxy sees the end of an application that has not read all."""
    proxy.sendall(MESSAGE)
    _poll(application)
    application.close()
    return end_of(proxy)


def spliced(application: socket.socket, proxy: socket.socket) -> object:
    """What splice() gets of data that poll() reports."""
    reading, writing = os.pipe()
    proxy.sendall(MESSAGE)
    assert _poll(application)
    application.setblocking(False)
    try:
        return os.splice(application.fileno(), writing, 1000)
    except BlockingIOError:
        return "EAGAIN"
    finally:
        os.close(reading)
        os.close(writing)


def urgent(application: socket.socket, proxy: socket.socket) -> object:
    """Whether an urgent byte is kept out of the stream."""
    proxy.sendall(b"a")
    proxy.send(b"!", socket.MSG_OOB)
    proxy.sendall(b"z")
    got = b""
    while not got.endswith(b"z"):
        got += receive_exactly(application, 1)
    return got.decode()


def reset(application: socket.socket, proxy: socket.socket) -> object:
    """What a blocking recv() says when the connection is reset, and what the next one says."""
    proxy.sendall(b"x")
    receive_exactly(application, 1)
    application.settimeout(None)
    proxy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    threading.Timer(0.2, proxy.close).start()
    said = []
    for _ in range(2):
        try:
            said.append(repr(application.recv(1)))
        except OSError as error:
            said.append(errno.errorcode[error.errno or 0])
    return said


def truncated(application: socket.socket, proxy: socket.socket) -> object:
    """What recv(MSG_TRUNC) leaves of a buffer: TCP only throws the bytes away."""
    proxy.sendall(MESSAGE)
    _poll(application)
    buffer = bytearray(b"-" * 10)
    assert application.recv_into(buffer, 10, socket.MSG_TRUNC) == 10
    return bytes(buffer) == MESSAGE[:10]


def thrown_away(application: socket.socket, proxy: socket.socket) -> object:
    """What recv(NULL, 10, MSG_TRUNC) says, by which a program skips bytes."""
    proxy.sendall(MESSAGE)
    _poll(application)
    size = _LIBC.recv(application.fileno(), None, 10, socket.MSG_TRUNC)
    return size if size >= 0 else errno.errorcode[ctypes.get_errno()]


def peek_offset(application: socket.socket, proxy: socket.socket) -> object:
    """Where a peek begins after SO_PEEK_OFF; the kernel has it for TCP since 6.9."""
    proxy.sendall(MESSAGE)
    _poll(application)
    try:
        application.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 100)
    except OSError:
        return "the kernel lacks it"
    return MESSAGE.index(application.recv(100, socket.MSG_PEEK))


def bytes_left(application: socket.socket, proxy: socket.socket) -> object:
    """Whether recvmsg() says how many bytes are left, as asked for by TCP_INQ."""
    application.setsockopt(socket.IPPROTO_TCP, TCP_INQ, 1)
    proxy.sendall(MESSAGE)
    _poll(application)
    _, told, _, _ = application.recvmsg(100, 100)
    return any(kind == TCP_CM_INQ for _, kind, _ in told)


def timestamp(application: socket.socket, proxy: socket.socket) -> object:
    """Whether recvmsg() says when the bytes came, as asked for by SO_TIMESTAMP."""
    application.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
    for _ in range(10):  # the kernel begins to note the times of packets a moment later (net_enable_timestamp)
        proxy.sendall(MESSAGE)
        _poll(application)
        _, told, _, _ = application.recvmsg(len(MESSAGE), 100)
        if told:
            return True
        time.sleep(0.02)
    return False


def on_the_wire(application: socket.socket, proxy: socket.socket) -> object:
    """Whether tcpdump would see the bytes, on the interface that carries them."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        tap.bind(("lo", 0))
        tap.settimeout(0.2)
        proxy.sendall(MESSAGE)
        receive_exactly(application, len(MESSAGE))
        with suppress(TimeoutError):
            while MESSAGE not in tap.recv(65536):
                pass
            return True
    return False


CASES = (
    *(reset, low_water, zero_copy, tcp_info, unsent, close_unread, spliced, urgent),
    *(truncated, thrown_away, peek_offset, bytes_left, timestamp, on_the_wire),
)


def _received(sock: socket.socket) -> int:
    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("Q", told, BYTES_RECEIVED)[0])


def _poll(sock: socket.socket, events: int = select.POLLIN, milliseconds: int = 200) -> object:
    poll = select.poll()
    poll.register(sock, events)
    return poll.poll(milliseconds)


def seen(bench: PairBench, case: Callable[[socket.socket, socket.socket], object], level: Level) -> object:
    """What a case sees, all of its messages going one way."""
    bench.set_level(level)
    with bench.pair() as pair:
        before = bench.traffic()
        found = case(pair.client, pair.server)
        after = bench.traffic()
    if level is Level.FULL:
        assert after.redirected > before.redirected, case.__name__
        assert (after.undrained, after.no_peer) == (before.undrained, before.no_peer), case.__name__
    else:
        assert after.redirected == before.redirected, case.__name__
    return found


def asleep_in_tcp(bench: PairBench, events: str) -> dict[str, object]:
    """What a reader gets that TCP has put to sleep with its first bytes, and how many messages were redirected then."""
    bench.set_level(Level.FULL)
    with bench.pair() as pair:
        bench.set_level(Level.OFF)
        got: list[bytes] = []
        if events == "low water":
            pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 60_000)
        pair.client.settimeout(None)
        flags = socket.MSG_WAITALL if events == "wait for all" else 0
        reader = threading.Thread(target=_read_whole, args=(pair, flags, got), daemon=True)
        reader.start()
        pair.server.sendall(WHOLE[:100])
        threading.Event().wait(0.3)  # for it to be asleep; if it is not yet, nothing can go wrong
        bench.set_level(Level.FULL)
        before = bench.traffic().redirected
        for at in range(100, len(WHOLE), 5000):
            pair.server.sendall(WHOLE[at : at + 5000])
        reader.join(3)
        redirected = bench.traffic().redirected - before
        is_stuck = reader.is_alive()
        with suppress(OSError):
            pair.client.shutdown(socket.SHUT_RDWR)
        reader.join()
        return {"stuck": is_stuck, "whole": b"".join(got) == WHOLE, "redirected": redirected}


def peeked(bench: PairBench) -> list[int]:
    """How many bytes of two messages a peek sees: both by TCP, then the second behind a redirected one."""
    seen_bytes = []
    for level in (Level.OFF, Level.FULL):
        bench.set_level(level)
        with bench.pair() as pair:
            pair.server.sendall(MESSAGE)
            _poll(pair.client)
            bench.set_level(Level.OFF)
            pair.server.sendall(MESSAGE)
            threading.Event().wait(0.1)  # TCP delivers at once, but not in the sender's own call
            seen_bytes.append(len(pair.client.recv(4 * len(MESSAGE), socket.MSG_PEEK)))
            receive_exactly(pair.client, 2 * len(MESSAGE))
    return seen_bytes


def short_read(bench: PairBench) -> dict[str, object]:
    """A reader that stops at a short read and waits for an edge, with bytes by TCP behind redirected ones."""
    bench.set_level(Level.FULL)
    with bench.pair() as pair, select.epoll() as epoll:
        pair.client.setblocking(False)
        epoll.register(pair.client, select.EPOLLIN | select.EPOLLET)
        pair.server.sendall(MESSAGE)
        bench.set_level(Level.OFF)
        pair.server.sendall(MESSAGE)
        threading.Event().wait(0.1)
        edges, sizes = [], []
        for _ in range(2):
            edges.append(bool(epoll.poll(0.2)))
            sizes.append(len(pair.client.recv(4 * len(MESSAGE))))
    return {"edges": edges, "sizes": sizes}


def available(bench: PairBench) -> list[int]:
    """What FIONREAD says of a redirected message, and of one by TCP."""
    found = []
    for level in (Level.FULL, Level.OFF):
        with bench.pair() as pair:
            bench.set_level(level)
            pair.server.sendall(MESSAGE)
            _poll(pair.client)
            found.append(struct.unpack("i", ioctl(pair.client, termios.FIONREAD, bytes(4)))[0])
        bench.set_level(Level.FULL)
    return found


def returning(bench: PairBench) -> dict[str, object]:
    """Of two readers that TCP has served before: what is redirected to one that blocks and to one that does not."""
    found = {}
    for name, timeout in (("blocking", None), ("not blocking", 1.0)):
        bench.set_level(Level.FULL)
        with bench.pair() as pair:
            bench.set_level(Level.OFF)
            pair.server.sendall(MESSAGE)
            pair.client.settimeout(timeout)
            receive_exactly(pair.client, len(MESSAGE))
            bench.set_level(Level.FULL)
            before = bench.traffic()
            for _ in range(10):
                pair.server.sendall(MESSAGE)
                receive_exactly(pair.client, len(MESSAGE))
            found[name] = bench.traffic().redirected - before.redirected
    return dict(found)


def queued(bench: PairBench) -> dict[str, int]:
    """What becomes of messages while a proxy reads nothing: a body with a small end, small ones early and later."""
    found: dict[str, int] = {}
    bench.set_level(Level.FULL)
    small = [b"small"] * 10
    with bench.pair() as pair:
        parts = {"tail": [bytes(20_000), bytes(20_000), b"end"], "early": small, "body": [bytes(30_000)], "late": small}
        for name, messages in parts.items():
            before = bench.traffic()
            for each in messages:
                pair.client.sendall(each)
            after = bench.traffic()
            found |= {f"{name} redirected": after.redirected - before.redirected}
            found |= {f"{name} over budget": after.over_budget - before.over_budget}
        receive_exactly(pair.server, sum(len(each) for messages in parts.values() for each in messages))
    return found


def crowded(bench: PairBench) -> dict[str, int]:
    """How many of 300 early small messages are redirected to a proxy that reads nothing."""
    bench.set_level(Level.FULL)
    with bench.pair() as pair:
        before = bench.traffic()
        for _ in range(300):
            pair.client.sendall(b"x")
        after = bench.traffic()
        receive_exactly(pair.server, 300)
    return {"redirected": after.redirected - before.redirected, "over budget": after.over_budget - before.over_budget}


def _read_whole(pair: Pair, flags: int, got: list[bytes]) -> None:
    while sum(map(len, got)) < len(WHOLE):
        chunk = pair.client.recv(len(WHOLE), flags)
        if not chunk:
            return
        got.append(chunk)
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)  # the rest may be less


def _main(cgroup: Path) -> dict[str, object]:
    with scratch_node(cgroup, CapturePolicy(acceleration=Level.FULL)) as scratch:
        bench = PairBench(scratch)
        found: dict[str, object] = {
            case.__name__: [seen(bench, case, level) for level in (Level.OFF, Level.FULL)] for case in CASES
        }
        found |= {events: asleep_in_tcp(bench, events) for events in ("wait for all", "low water")}
        found["returning"] = returning(bench)
        found["peeked"] = peeked(bench)
        found["short read"] = short_read(bench)
        found["available"] = available(bench)
        found["queued"] = queued(bench)
        found["crowded"] = crowded(bench)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(Path(sys.argv[1]))))
