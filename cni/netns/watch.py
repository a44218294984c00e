"""Notices when addresses, interfaces, routes or rules in pods' namespaces change, and when a namespace is gone.

A descriptor of a namespace, or a socket inside it, would keep a deleted pod's namespace alive. rtnetlink can listen
from outside (NETLINK_LISTEN_ALL_NSID): a socket hears every namespace that has a number (nsid) in the socket's own
namespace. A number keeps no namespace alive.

The socket's own namespace is an empty one, made for this purpose. So the socket hears the watched pods, but not the
node's own routes. Nobody else gives out numbers there, and no number is used twice. So a late message about a dead pod
cannot be taken for a message about another pod.
"""

import ctypes
import errno
import math
import os
import select
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from bpf.errors import KernelRefused
from bpf.layout import INBOUND_SOURCE6
from cni.netns.dumps import SEQUENCE
from cni.netns.rtnl import Rtnl, listen

GROUPS = (
    rtnl.RTNLGRP_LINK,
    rtnl.RTNLGRP_IPV4_IFADDR,
    rtnl.RTNLGRP_IPV6_IFADDR,
    rtnl.RTNLGRP_IPV4_ROUTE,
    rtnl.RTNLGRP_IPV6_ROUTE,
    rtnl.RTNLGRP_IPV4_RULE,
    rtnl.RTNLGRP_IPV6_RULE,
)
_ROOM = 16 << 20  # bytes of buffer, which the kernel doubles: some 30,000 changes. Takes memory only while they wait
LEAST_COST = 512  # bytes of buffer that a message takes at least: struct sk_buff and skb_shared_info alone take more
HEAD = 256  # bytes to read of a message: enough for the fixed part, or for all of an RTM_DELNSID
_CLONE_NEWNET = 0x40000000  # uapi/linux/sched.h
_AF_BRIDGE = 7  # linux/socket.h
_IFF_UP = 0x1  # uapi/linux/if.h
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Changes:
    """What has happened, by netns cookie: pods that have `changed`, and pods whose namespace is `gone`.

    Pods that are gone are not watched any more.
    """

    changed: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.changed or self.gone)


class Watch:
    """Watches pods' network namespaces. One thread waits; any thread adds, removes and wakes.

    Close it when no thread waits any more. Needs Linux 5.0 and, in the agent's user namespace, CAP_SYS_ADMIN (to make a
    namespace), CAP_NET_ADMIN (for numbers and buffer) and CAP_NET_BROADCAST (to hear other namespaces). These cover the
    pods' user namespaces too, which are below the agent's.
    """

    def __init__(self, room: int = _ROOM) -> None:
        """`room` is the size in bytes of the buffer for changes that nobody has read yet. Raises KernelRefused."""
        self._lock = threading.Lock()
        self._cookies: dict[int, int] = {}  # by nsid
        self._nsids: dict[int, int] = {}  # by cookie
        self._last_nsid = 0
        self._overrun = False
        self._socket, self._asking = _open_elsewhere(room)
        self._capacity = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // LEAST_COST + 1
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        for each in (self._socket, self._wakeup):
            self._poll.register(each, select.POLLIN)

    def add(self, cookie: int, netns_fd: int) -> None:
        """Watch a namespace; harmless if repeated. The descriptor is needed during the call only. Raises OSError.

        Read the pod's state after this call. If it is read before, a change in between is missed.
        """
        with self._lock:
            if cookie in self._nsids:
                return
            # a namespace that was watched before still has its number
            nsid = self._asking.number(netns_fd, self._last_nsid + 1)
            self._last_nsid = max(self._last_nsid, nsid)
            self._cookies[nsid], self._nsids[cookie] = cookie, nsid

    def remove(self, cookie: int) -> None:
        """Stop watching a namespace; harmless if repeated."""
        with self._lock:
            self._forget(cookie)

    def wait(self, timeout: float | None = None) -> Changes:
        """Block until a watched namespace has changed or is gone, `timeout` seconds have passed, or wake() was called.

        One answer has all changes so far. If the kernel had to drop messages, all watched pods count as changed.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            ready = self._poll.poll(None if timeout is None else max(0, (deadline - time.monotonic()) * 1000))
            woken = any(fd == self._wakeup for fd, _ in ready)
            if woken:
                os.eventfd_read(self._wakeup)
            with self._lock:
                changes = self._drain()
            if changes or woken or time.monotonic() >= deadline:
                return changes

    def wake(self) -> None:
        """End the current wait, or the next one if no thread waits. Takes no lock, so signal handlers may call it."""
        os.eventfd_write(self._wakeup, 1)

    def let_go_of_unused(self, proc: Path) -> None:
        """Do nothing: this watch keeps no namespace alive."""

    def close(self) -> None:
        """Close the sockets. The namespace made for them ends with them."""
        self._socket.close()
        self._asking.close()
        os.close(self._wakeup)

    def _drain(self) -> Changes:
        """Read the queued messages, at most as many as fit the buffer: a pod that never stops must not keep us here."""
        changed: set[int] = set()
        gone: set[int] = set()
        ended = False
        for _ in range(self._capacity):
            try:
                message, control, _, _ = self._socket.recvmsg(HEAD, socket.CMSG_SPACE(4))
            except BlockingIOError:
                ended = True
                break
            except OSError as error:  # ENOBUFS, once: the kernel now drops all messages until the queue has been read
                if error.errno == errno.EBADF:
                    raise
                self._overrun = True
                continue
            if control:
                cookie = self._cookies.get(struct.unpack("=i", control[0][2])[0])
                if cookie is not None and matters(message):
                    changed.add(cookie)
            else:  # from the socket's own namespace, in which only numbers change
                gone |= {self._cookies[nsid] for nsid in _freed(message) if nsid in self._cookies}
        if self._overrun:
            gone |= {cookie for nsid, cookie in self._cookies.items() if not self._asking.is_number_alive(nsid)}
            changed |= self._nsids.keys()
            self._overrun = not ended
        for cookie in gone:
            self._forget(cookie)
        return Changes(frozenset(changed - gone), frozenset(gone))

    def _forget(self, cookie: int) -> None:
        if cookie in self._nsids:
            del self._cookies[self._nsids.pop(cookie)]


def _freed(message: bytes) -> list[int]:
    """The numbers of namespaces that are gone, if the message says so."""
    parsed = MarshalRtnl().parse(message)
    return [each.get_attr("NETNSA_NSID") for each in parsed if each["header"]["type"] == rtnl.RTM_DELNSID]


def matters(message: bytes) -> bool:
    """Whether a message is about an address, a route, a rule, or a link that comes, goes, turns up or down, or is
    renamed.

    Each datagram has one message. It begins with struct nlmsghdr: 16 bytes, with the type at offset 4. The struct after
    it begins with the address family. If that struct is an ifinfomsg, it has at offset 12 the flags that changed: all
    flags of a new link, none of a renamed one.
    """
    kind, _, sequence = struct.unpack_from("=HHI", message, 4)
    # a change that plumbing.py has made; the message about ::6 comes late, without the sequence number of its request
    if sequence == SEQUENCE or INBOUND_SOURCE6.packed in message:
        return False
    if kind not in (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK):
        return kind not in (rtnl.RTM_NEWNSID, rtnl.RTM_DELNSID)  # numbers that the pod itself has given out
    if message[16] == _AF_BRIDGE:
        return False  # from a bridge, about a port; the port is a link and has messages of its own
    (change,) = struct.unpack_from("=I", message, 16 + 12)
    return change == 0 or bool(change & _IFF_UP)  # other flags, such as promiscuous mode, do not matter


def _open_elsewhere(room: int) -> tuple[socket.socket, Rtnl]:
    """The listening and the asking socket, in a new namespace that exists as long as they do."""

    def inside() -> tuple[socket.socket, Rtnl]:
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return listen((*GROUPS, rtnl.RTNLGRP_NSID), room, everywhere=True), Rtnl()

    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="watch") as visitor:  # its thread ends here
            return visitor.submit(inside).result()
    except OSError as error:
        needs = "run as root with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_BROADCAST"
        why = f"cannot watch the pods' namespaces: {error.strerror}; {needs}"
        raise KernelRefused(why, error.errno or 0) from error
