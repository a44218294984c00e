"""A double of ztunnel's side of ZDS: it connects, takes pods as the real one does, and refuses what that refuses.

It reads the wire by itself, not with the agent's code, so that a mistake there is not made twice. Of the proxy it has
the part that ZDS depends on: sockets that listen in the pod's network namespace.
"""

import ctypes
import os
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

# of ztunnel's ports, those that it listens on in any pod: outbound, inbound in the clear, inbound HBONE
PORTS = (15001, 15006, 15008)
MARK = 0x539
RECORD = 1024

_HELLO = b"\x08\x01"
_SNAPSHOT, _ADD, _DEL, _KEEP = 3, 1, 2, 5  # fields of a WorkloadRequest
_CLONE_NEWNET = 0x40000000
_SO_REUSEPORT, _IPV6_V6ONLY = 15, 26
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 15.0
_KEPT_MESSAGES = 5000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Message(NamedTuple):
    """What came: add, keep, del or snapshot, of which pod, and the answer ("" if it was accepted)."""

    kind: str
    uid: str = ""
    refusal: str = ""


class ProtocolError(Exception):
    """What makes ztunnel refuse a message and connect anew."""


class StartError(Exception):
    """What makes ztunnel refuse a pod and try again by itself."""


class Served(Protocol):
    """What has been started for a pod, in the namespace with this device and inode."""

    namespace: tuple[int, int]

    def close(self) -> None:
        """End it."""
        ...


class Proxy:
    """A pod's proxy: sockets that listen in its namespace, known by device and inode of that."""

    def __init__(self, netns: int, ports: tuple[int, ...]) -> None:
        """Take over a descriptor of the namespace. Raises StartError."""
        found = os.fstat(netns)
        self.netns, self.namespace = netns, (found.st_dev, found.st_ino)
        self._listeners: list[socket.socket] = []
        try:
            self._listen(ports)
        except OSError as error:
            self.close()
            raise StartError(f"failure to start proxy: {error.strerror}") from error

    def _listen(self, ports: tuple[int, ...]) -> None:
        if not ports:
            return
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(self.netns)
            try:
                for port in ports:
                    self._listeners.append(_listener(port))
            finally:
                _enter(home)
        finally:
            os.close(home)

    def close(self) -> None:
        """Listen no more, and let go of the namespace."""
        for each in self._listeners:
            each.close()
        os.close(self.netns)


class Ztunnel:
    """One ztunnel, connected while running(). What it has of pods outlives its connections."""

    def __init__(
        self, path: Path, ports: tuple[int, ...] = PORTS, start: Callable[[str, int], Served] | None = None
    ) -> None:
        """`start` starts a pod's proxy, given by UID and a descriptor that it takes over. Raises StartError."""
        self._path, self._start = path, start or (lambda _, netns: Proxy(netns, ports))
        self.proxies: dict[str, Served] = {}
        self.pending: set[str] = set()  # refused, and tried again by itself
        self.described: dict[str, tuple[str, str, str]] = {}  # UID → name, namespace, service account
        self.messages: deque[Message] = deque(maxlen=_KEPT_MESSAGES)
        self.counts: Counter[str] = Counter()
        self.answers = threading.Event()  # while cleared, messages are taken and not answered
        self.answers.set()
        self.dies_after = 0  # so many messages later it is killed: no answer, the connection breaks
        self.is_ready = False
        self.connections = 0
        self._snapshot: set[str] | None = set()  # UIDs of the snapshot; None once that has come
        self._socket: socket.socket | None = None
        self._stopping = threading.Event()

    @contextmanager
    def running(self) -> Iterator["Ztunnel"]:
        """Be connected, again and again, until the context ends or it dies."""
        thread = threading.Thread(target=self._run, name="ztunnel-double")
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()
            for each in self.proxies.values():
                each.close()
            self.proxies.clear()

    def stop(self) -> None:
        """End the connection for good. The proxies stay until running() ends."""
        self._stopping.set()
        self.answers.set()
        self.disconnect()

    def disconnect(self) -> None:
        """Break the connection. It connects again."""
        if found := self._socket:
            with suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def say(self, record: bytes) -> None:
        """Send a record that nobody has asked for."""
        assert self._socket
        self._socket.send(record)

    def received(self, kind: str) -> list[str]:
        """The UIDs of all messages of a kind so far."""
        return [each.uid for each in list(self.messages) if each.kind == kind]

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connected:
                try:
                    connected.connect(str(self._path))
                    self._socket, self._snapshot = connected, set()
                    self.pending.clear()
                    connected.send(_HELLO)
                    self.connections += 1
                    pause = _FIRST_PAUSE
                    self._serve(connected)
                except (OSError, ProtocolError):
                    pass
                finally:
                    self._socket, self.is_ready = None, False
            self._stopping.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _serve(self, connected: socket.socket) -> None:
        while True:
            record, descriptors, flags, _ = socket.recv_fds(connected, RECORD, 4)
            if not record:
                return
            if self.dies_after:
                self.dies_after -= 1
                if not self.dies_after:
                    _close_all(descriptors)
                    self._stopping.set()
                    return
            self.answers.wait()
            kind, uid, refusal, broken = "?", "", "", False
            try:
                kind, uid = self._take(record, descriptors, flags)
            except StartError as error:
                refusal = str(error)
            except ProtocolError as error:
                refusal, broken = str(error), True
            self._note(Message(kind, uid, refusal))
            connected.send(_answer(refusal))
            if broken:
                raise ProtocolError(refusal)

    def _note(self, message: Message) -> None:
        self.messages.append(message)
        self.counts[message.kind] += 1

    def _take(self, record: bytes, descriptors: list[int], flags: int) -> tuple[str, str]:
        """Do what a record asks for. Returns its kind and pod. Raises ProtocolError, StartError."""
        if len(descriptors) > 1 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close_all(descriptors)
            raise ProtocolError("truncated" if len(descriptors) < 2 else f"expected 1 FD, got {len(descriptors)}")
        ((field, payload),) = _fields(record) or ((0, b""),)
        if field != _ADD and descriptors:
            _close_all(descriptors)
            raise ProtocolError("unexpected control message")
        if field == _ADD:
            return "add", self._add(payload, descriptors)
        if field == _KEEP:
            return "keep", self._keep(_text(payload, 1))
        if field == _DEL:
            return "del", self._delete(_text(payload, 2))
        if field == _SNAPSHOT:
            return "snapshot", self._reconcile()
        raise ProtocolError("no payload")

    def _add(self, payload: bytes, descriptors: list[int]) -> str:
        if not descriptors:
            raise ProtocolError("no control message")
        (netns,) = descriptors
        uid, info = _text(payload, 1), dict(_fields(payload)).get(2)
        if info is None:
            os.close(netns)
            raise ProtocolError("no workload info")
        if self._snapshot is not None:
            self._snapshot.add(uid)
        self.described[uid] = (_text(info, 1), _text(info, 2), _text(info, 3))
        known, found = self.proxies.get(uid), os.fstat(netns)
        if known and known.namespace == (found.st_dev, found.st_ino):
            os.close(netns)
            return uid
        if known:
            self.proxies.pop(uid).close()
        try:
            self.proxies[uid] = self._start(uid, netns)
        except StartError:
            self.pending.add(uid)
            self._note(Message("refused", uid))
            raise
        self.pending.discard(uid)
        return uid

    def _keep(self, uid: str) -> str:
        if self._snapshot is None:
            raise ProtocolError("protocol error: keep after the snapshot")
        self._snapshot.add(uid)
        return uid

    def _delete(self, uid: str) -> str:
        if self._snapshot is not None:
            raise ProtocolError("protocol error: del before the snapshot")
        self.pending.discard(uid)
        if known := self.proxies.pop(uid, None):
            known.close()
        return uid

    def _reconcile(self) -> str:
        if self._snapshot is None:
            raise ProtocolError("protocol error: a second snapshot")
        for uid in self.proxies.keys() - self._snapshot:
            self.proxies.pop(uid).close()
        self._snapshot = None
        self.is_ready = not self.pending
        return ""


def namespace_of(path: Path) -> tuple[int, int]:
    """Device and inode, by which ztunnel tells namespaces apart."""
    found = path.stat()
    return found.st_dev, found.st_ino


def wait_ready(ztunnel: Ztunnel, seconds: float = 10) -> None:
    """Wait until it has got a snapshot. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not ztunnel.is_ready:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no snapshot within {seconds} s; it got {list(ztunnel.messages)[-5:]}")
        time.sleep(0.005)


def _listener(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        made.setsockopt(socket.SOL_SOCKET, _SO_REUSEPORT, 1)
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_V6ONLY, 0)
        made.bind(("::", port))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def _enter(netns: int) -> None:
    if _LIBC.setns(netns, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _close_all(descriptors: list[int]) -> None:
    for each in descriptors:
        os.close(each)


def _answer(refusal: str) -> bytes:
    """A WorkloadResponse with an Ack."""
    text = refusal.encode()[:100]
    ack = (struct.pack("BB", 0x0A, len(text)) + text) if text else b""
    return struct.pack("BB", 0x0A, len(ack)) + ack


def _fields(message: bytes) -> tuple[tuple[int, bytes], ...]:
    """The fields of a protobuf message, all of which have a length. Raises ProtocolError."""
    found, at = [], 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 != 2:
            raise ProtocolError(f"a field of wire type {tag & 7}")
        length, at = _varint(message, at)
        if at + length > len(message):
            raise ProtocolError("a field that is cut off")
        found.append((tag >> 3, message[at : at + length]))
        at += length
    return tuple(found)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if not byte & 0x80:
            return value, at
    raise ProtocolError("a number that is cut off")


def _text(message: bytes, field: int) -> str:
    return dict(_fields(message)).get(field, b"").decode()
