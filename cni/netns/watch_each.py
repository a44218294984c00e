"""Watches pods' network namespaces by a socket inside each: for an agent without CAP_NET_BROADCAST.

Istio's DaemonSet does not give that capability, so watch.py's one socket cannot hear other namespaces there. A socket
inside a namespace keeps the namespace alive. So a pod's socket is closed at its DEL, and let_go_of_unused() closes the
sockets of pods whose DEL never came.
"""

import errno
import math
import os
import select
import socket
import threading
import time
from pathlib import Path

from cni.netns.namespaces import unused
from cni.netns.rtnl import listen
from cni.netns.sandbox import visit
from cni.netns.watch import GROUPS, HEAD, LEAST_COST, Changes, matters

_ROOM = 1 << 18  # bytes of buffer for each pod, which the kernel doubles: some 1,000 changes


class WatchEach:
    """The same as Watch, but never says that a namespace is gone. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN."""

    def __init__(self, room: int = _ROOM) -> None:
        """`room` is the size in bytes of each pod's buffer for changes that nobody has read yet."""
        self._room = room
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}  # by netns cookie
        self._inodes: dict[int, int] = {}  # of the namespaces, by cookie
        self._cookies: dict[int, int] = {}  # by the socket's descriptor
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()  # unlike poll(), it takes sockets while a thread waits
        self._poll.register(self._wakeup, select.EPOLLIN)

    def add(self, cookie: int, netns_fd: int) -> None:
        """Watch a namespace; harmless if repeated. Raises SandboxInvalid.

        Read the pod's state after this call. If it is read before, a change in between is missed.
        """
        with self._lock:
            if cookie in self._sockets:
                return
            inode = os.fstat(netns_fd).st_ino
            made = visit(netns_fd, lambda _: listen(GROUPS, self._room, everywhere=False))
            self._sockets[cookie], self._cookies[made.fileno()] = made, cookie
            self._inodes[cookie] = inode
            self._poll.register(made, select.EPOLLIN)

    def remove(self, cookie: int) -> None:
        """Stop watching a namespace; harmless if repeated."""
        with self._lock:
            self._forget(cookie)

    def wait(self, timeout: float | None = None) -> Changes:
        """Block until a watched namespace has changed, `timeout` seconds have passed, or wake() was called.

        One answer has all changes so far. If the kernel had to drop messages of a pod, the pod counts as changed.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            ready = self._poll.poll(None if timeout is None else max(0.0, deadline - time.monotonic()))
            woken = any(fd == self._wakeup for fd, _ in ready)
            if woken:
                os.eventfd_read(self._wakeup)
            with self._lock:
                heard = {self._cookies[fd] for fd, _ in ready if fd in self._cookies}
                changes = Changes(frozenset(cookie for cookie in heard if self._drain(self._sockets[cookie])))
            if changes or woken or time.monotonic() >= deadline:
                return changes

    def wake(self) -> None:
        """End the current wait, or the next one if no thread waits. Takes no lock, so signal handlers may call it."""
        os.eventfd_write(self._wakeup, 1)

    def let_go_of_unused(self, proc: Path) -> None:
        """Stop watching namespaces that no process and no mount of the node uses: only our socket keeps them alive.

        `proc` is a procfs of the node. Raises OSError.
        """
        with self._lock:
            left = unused(set(self._inodes.values()), proc)
            for cookie in [cookie for cookie, inode in self._inodes.items() if inode in left]:
                self._forget(cookie)

    def close(self) -> None:
        """Close the sockets."""
        for cookie in list(self._sockets):
            self._forget(cookie)
        self._poll.close()
        os.close(self._wakeup)

    def _drain(self, heard: socket.socket) -> bool:
        """Read the queued messages, at most as many as fit the buffer; whether one of them matters."""
        changed = False
        for _ in range(2 * self._room // LEAST_COST + 1):
            try:
                changed |= matters(heard.recv(HEAD))
            except BlockingIOError:
                break
            except OSError as error:  # ENOBUFS: the kernel has dropped messages
                if error.errno == errno.EBADF:
                    raise
                changed = True
        return changed

    def _forget(self, cookie: int) -> None:
        if cookie in self._sockets:
            closing = self._sockets.pop(cookie)
            del self._cookies[closing.fileno()], self._inodes[cookie]
            closing.close()  # which also takes it out of the epoll
