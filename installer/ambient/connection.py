"""One connection of a ztunnel: its greeting, the snapshot, and then one request after the other.

Answers carry no number: the next one belongs to the request before. So a request is sent only when the one before it
has been answered. A thread for each connection does all of it; others queue requests and wait for a limited time.
"""

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import closing, suppress
from dataclasses import dataclass, field

import structlog

from bpf.errors import SidestepError
from bpf.syscalls import Descriptor
from installer.ambient import protocol
from installer.ambient.protocol import LONGEST_RECORD, ProtocolError, Workload

log = structlog.get_logger("zds")

# Istio's agent waits so many seconds for the greeting and for each answer, and queues so many requests
ANSWER_SECONDS = 5.0
_QUEUE = 100
# Seconds that a connection is kept which owes an answer. Whoever waited for it has gone by then. Without its answer
# nothing more can be sent, and ztunnel gets a snapshot if it connects again.
_OWED_SECONDS = 30.0


class ZtunnelAway(SidestepError):
    """No ztunnel has taken the request: none is connected, it has gone meanwhile, or it does not answer."""


class ZtunnelRefused(SidestepError):
    """ztunnel has answered that it can't do what it was asked for."""


@dataclass(frozen=True)
class Held:
    """A pod for the snapshot. `netns` is a descriptor of its namespace, which has the cookie `cookie`.

    Without a namespace (None) ztunnel is told to keep what it has of the pod.
    """

    workload: Workload
    netns: int | None = None
    cookie: int = 0


Snapshot = Callable[[], Generator[Held, None, None]]


@dataclass
class _Request:
    """A queued request. `cookie` is that of the namespace that ztunnel holds once it has accepted; None: it lets go."""

    record: bytes
    uid: str
    cookie: int | None
    netns: Descriptor | None
    answered: Future[None] = field(default_factory=Future)

    def close(self) -> None:
        if self.netns:
            self.netns.close()


class Connection:
    """A ztunnel that is connected. Everything but run() may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self.socket = sock
        self.socket.settimeout(ANSWER_SECONDS)
        self._lock = threading.Lock()
        self._queue: deque[_Request] = deque()
        self._wakes = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)
        self._poll.register(self._wakes.fd, select.POLLIN)
        self._held: dict[str, int] = {}  # UID → cookie of the namespace that this ztunnel has accepted
        self._is_over = False
        self.has_snapshot = False  # whether it has got all of the snapshot

    def holds(self, uid: str) -> int | None:
        """The cookie of the namespace that this ztunnel has accepted for a pod; None if it has accepted none."""
        with self._lock:
            return self._held.get(uid)

    def held(self) -> dict[str, int]:
        """The pods that this ztunnel has accepted, by UID, each with the cookie of its namespace."""
        with self._lock:
            return dict(self._held)

    def add(self, workload: Workload, netns: int, cookie: int) -> Future[None]:
        """Queue that a pod is handed over. `netns` is a descriptor of its namespace, which the caller may close.

        Raises ProtocolError, ZtunnelAway.
        """
        copy = Descriptor(os.dup(netns))
        try:
            return self._queued(_Request(protocol.add(workload), workload.uid, cookie, copy))
        except BaseException:
            copy.close()
            raise

    def delete(self, uid: str) -> Future[None]:
        """Queue that a pod is taken back. Raises ZtunnelAway."""
        return self._queued(_Request(protocol.delete(uid), uid, None, None))

    def run(self, is_greeted: Callable[[], Snapshot], is_synced: Callable[[], None]) -> None:
        """Serve until the connection ends.

        Call `is_greeted` after the greeting, which gives the snapshot to send, and `is_synced` after the snapshot.
        """
        why = "it was closed"
        try:
            version = protocol.hello_version(self._receive())
            log.info("ztunnel.connected", version=version)
            self._send_snapshot(is_greeted())
            is_synced()
            while request := self._next():
                self._exchange(request)
        except TimeoutError:
            why = f"no answer within {_OWED_SECONDS if self.has_snapshot else ANSWER_SECONDS:.0f} s"
        except (OSError, SidestepError) as error:
            why = getattr(error, "strerror", None) or str(error)
        finally:
            self._end(why)

    def close(self) -> None:
        """End the connection. run() then returns soon."""
        with suppress(OSError):  # the other end has gone already
            self.socket.shutdown(socket.SHUT_RDWR)

    def _send_snapshot(self, snapshot: Snapshot) -> None:
        """Send all pods. A pod that ztunnel refuses does not keep the others from it. Raises OSError, ProtocolError."""
        pods = 0
        with closing(snapshot()) as held:
            for each in held:
                pods += 1
                try:
                    netns = each.netns
                    record = protocol.keep(each.workload.uid) if netns is None else protocol.add(each.workload)
                except ProtocolError as error:
                    log.error("ztunnel.not_told", pod=str(each.workload), problem=str(error))
                    continue
                self._send(record, netns)
                refusal = protocol.refusal_in(self._receive())
                if refusal:
                    log.warning("ztunnel.refused", pod=str(each.workload), problem=refusal)
                elif netns is not None:
                    with self._lock:
                        self._held[each.workload.uid] = each.cookie
        self._send(protocol.snapshot_sent(), None)
        if refusal := protocol.refusal_in(self._receive()):
            log.warning("ztunnel.refused", problem=refusal)
        self.has_snapshot = True
        log.info("ztunnel.synced", pods=pods, added=len(self._held))

    def _queued(self, request: _Request) -> Future[None]:
        with self._lock:
            if self._is_over:
                raise ZtunnelAway("ztunnel has just gone; try again")
            if len(self._queue) >= _QUEUE:
                raise ZtunnelAway(f"{_QUEUE} requests wait for ztunnel already; try again")
            self._queue.append(request)
            with suppress(BlockingIOError):  # it has been woken often enough
                os.eventfd_write(self._wakes.fd, 1)
        return request.answered

    def _next(self) -> _Request | None:
        """Wait for a request. None if ztunnel has gone meanwhile. Raises ProtocolError if it says something unasked."""
        while True:
            with self._lock:
                if self._queue:
                    return self._queue.popleft()
            ready = [fd for fd, _ in self._poll.poll()]
            if self.socket.fileno() in ready:
                if self.socket.recv(LONGEST_RECORD):
                    raise ProtocolError("ztunnel has said something that nobody has asked")
                return None
            with suppress(BlockingIOError):
                os.eventfd_read(self._wakes.fd)

    def _exchange(self, request: _Request) -> None:
        """Send a request and wait for its answer, longer than whoever has asked. Raises OSError, ProtocolError."""
        try:
            if not request.answered.set_running_or_notify_cancel():  # whoever has asked waits no more
                return
            self._send(request.record, request.netns.fd if request.netns else None)
            refusal = protocol.refusal_in(self._receive(_OWED_SECONDS))
        except BaseException as error:
            self._settle(request, ZtunnelAway(f"ztunnel has gone: {getattr(error, 'strerror', None) or error}"))
            raise
        finally:
            request.close()
        self._note(request, refusal)
        self._settle(request, ZtunnelRefused(f"ztunnel refuses: {refusal}") if refusal else None)

    def _note(self, request: _Request, refusal: str) -> None:
        with self._lock:
            if request.cookie is not None and not refusal:
                self._held[request.uid] = request.cookie
            elif request.cookie is not None or not refusal:  # it has given up what it had, or never had it
                self._held.pop(request.uid, None)

    @staticmethod
    def _settle(request: _Request, error: SidestepError | None) -> None:
        with suppress(InvalidStateError):
            if error:
                request.answered.set_exception(error)
            else:
                request.answered.set_result(None)

    def _send(self, record: bytes, netns: int | None) -> None:
        self.socket.settimeout(ANSWER_SECONDS)
        if netns is None:
            self.socket.send(record)
        else:
            socket.send_fds(self.socket, [record], [netns])

    def _receive(self, seconds: float | None = None) -> bytes:
        """The next record. Raises ConnectionError if the other end has gone, TimeoutError, ProtocolError."""
        self.socket.settimeout(ANSWER_SECONDS if seconds is None else seconds)
        record, _, flags, _ = self.socket.recvmsg(LONGEST_RECORD)
        if flags & socket.MSG_TRUNC:
            raise ProtocolError(f"ztunnel's record is longer than {LONGEST_RECORD} bytes")
        if not record:
            raise ConnectionResetError("it has closed the connection")
        return record

    def _end(self, why: str) -> None:
        with self._lock:
            self._is_over = True
            left, self._held = list(self._queue), {}
            self._queue.clear()
            self._wakes.close()
        for each in left:
            each.close()
            if each.answered.set_running_or_notify_cancel():
                self._settle(each, ZtunnelAway(f"ztunnel has gone: {why}"))
        self.socket.close()
        log.info("ztunnel.gone", why=why)


def wait_for(answered: Future[None], until: float) -> None:
    """Wait for an answer until a time of the monotonic clock. Raises ZtunnelAway, ZtunnelRefused."""
    try:
        answered.result(max(0.0, until - time.monotonic()))
    except TimeoutError:
        if not answered.done():
            answered.cancel()  # if it still waits in the queue, it is never sent
        raise ZtunnelAway(f"ztunnel has not answered within {ANSWER_SECONDS:.0f} s") from None
