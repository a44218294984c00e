"""Tells when something changes in pods' network namespaces: one rtnetlink socket in the agent's own, for all of them.

It hears other namespaces because they have an id here (an "nsid") and holds none of them: an open descriptor would keep
a deleted pod's namespace alive. Needs CAP_NET_BROADCAST over the pods' user namespaces, as root on the host has.
"""

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cni.rtnl import Rtnl

_SO_RCVBUFFORCE = 33  # uapi/asm-generic/socket.h
# uapi/linux/netlink.h
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _LISTEN_ALL_NSID = 1, 8
# uapi/linux/rtnetlink.h: groups LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, NSID
_GROUPS = (1, 5, 7, 9, 11, 28)
_RTM_DELNSID = 89
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_NSID_AT = struct.Struct("=16x4x4xi")  # nlmsghdr, padded rtgenmsg, nlattr header, NETNSA_NSID: its first attribute
_NSID = struct.Struct("=i")
_BUFFER = 1 << 16
# Room for some ten thousand events; when even that overflows, everything counts as changed.
_RECEIVE_BUFFER = 8 << 20


@dataclass(frozen=True)
class Changes:
    """Netns cookies of pods in whose namespace something has changed, and of those whose namespace is gone."""

    changed: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()


class Watch:
    """Listens from the calling thread's namespace. add(), remove() and wake() may be called from any thread."""

    def __init__(self, receive_buffer: int = _RECEIVE_BUFFER) -> None:
        """`receive_buffer` is in bytes. Raises OSError when the kernel does not let us listen."""
        self._cookies: dict[int, int] = {}  # by nsid
        self._lock = threading.Lock()
        self._asking = Rtnl()  # opened here: a socket stays in the namespace it was made in
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, 0))  # without an address it hears nothing
        self._waking = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        self._socket.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
        for group in _GROUPS:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def add(self, cookie: int, netns_fd: int) -> None:
        """Watch a namespace; again does no harm. Raises OSError."""
        with self._lock:
            self._cookies[self._asking.nsid_of(netns_fd)] = cookie

    def remove(self, cookie: int) -> None:
        """Watch it no more."""
        with self._lock:
            self._cookies = {nsid: other for nsid, other in self._cookies.items() if other != cookie}

    def wake(self) -> None:
        """End a wait() that is under way, or else the next one."""
        os.eventfd_write(self._waking, 1)

    def wait(self, timeout: float | None) -> Changes:
        """What has changed, as soon as something has; nothing after `timeout` seconds (None: never) or on wake()."""
        poll = select.poll()
        for fd in (self._socket.fileno(), self._waking):
            poll.register(fd, select.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = [fd for fd, _ in poll.poll(remaining)]
            if self._waking in ready:
                os.eventfd_read(self._waking)
            changes = self._drain()
            if (
                changes.changed
                or changes.gone
                or self._waking in ready
                or (deadline is not None and time.monotonic() >= deadline)
            ):
                return changes

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._asking.close()
        os.close(self._waking)

    def _drain(self) -> Changes:
        """Everything that has been received, as a whole."""
        changed: set[int] = set()
        gone: set[int] = set()
        while True:
            try:
                data, control, _, _ = self._socket.recvmsg(_BUFFER, socket.CMSG_SPACE(_NSID.size))
            except BlockingIOError:
                return Changes(frozenset(changed), frozenset(gone))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                with self._lock:  # events were lost: nobody knows whose
                    changed.update(self._cookies.values())
                continue
            nsid = next((_NSID.unpack(value)[0] for _, kind, value in control if kind == _LISTEN_ALL_NSID), None)
            with self._lock:
                if nsid is None:  # our own namespace's: other ones number their neighbours differently
                    gone.update(self._cookies.pop(each) for each in _deleted(data) if each in self._cookies)
                elif nsid in self._cookies:
                    changed.add(self._cookies[nsid])


def _deleted(data: bytes) -> Iterator[int]:
    """The nsids of namespaces that a datagram says are gone."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == _RTM_DELNSID and length >= _NSID_AT.size:
            yield int(_NSID_AT.unpack_from(data, at)[0])
        at += max(_HEADER.size, (length + 3) & ~3)
