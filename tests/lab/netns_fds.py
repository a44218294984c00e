"""Network namespaces without a name: they last as long as a descriptor of theirs, so nothing has to be cleaned up."""

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from cni.netns.sandbox import own_cookie
from tests.lab.inside import enter_netns

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespace:
    """A descriptor of a namespace, and the namespace's cookie."""

    fd: int
    cookie: int

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino


@contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """So many new ones, in which nothing is up."""
    made: list[Namespace] = []
    try:
        with ThreadPoolExecutor(1) as apart:  # a thread that stays in the last of them, and ends
            for _ in range(count):
                made.append(apart.submit(_make).result())
        yield made
    finally:
        for each in made:
            os.close(each.fd)


def _make() -> Namespace:
    if _LIBC.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    return Namespace(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), own_cookie())


@contextmanager
def occupied(netns: int, port: int) -> Iterator[None]:
    """Somebody in the pod listens on a port of ztunnel's."""
    made: list[socket.socket] = []

    def listen() -> None:
        enter_netns(netns)
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        listener.bind(("::", port))
        listener.listen()
        made.append(listener)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    try:
        yield
    finally:
        made[0].close()
