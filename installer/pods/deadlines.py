"""HTTP connections whose answers have a deadline as a whole.

The timeout of a socket is for each read alone. A server that sends a byte of its headers now and then would never reach
it.
"""

import io
import socket
import time
from functools import partial
from http.client import HTTPResponse
from typing import Any
from urllib.parse import parse_qs, urlsplit

import urllib3


def give_deadlines(manager: urllib3.PoolManager) -> None:
    """Have the connections of a pool manager take their read timeout for a whole answer, or for a watch's headers."""
    pools: dict[str, Any] = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: _punctual(pool) for scheme, pool in pools.items()}


def _punctual(pool: Any) -> Any:
    """A class of connection pools whose connections keep deadlines."""
    connection = type(pool.ConnectionCls.__name__, (_Punctual, pool.ConnectionCls), {})
    return type(pool.__name__, (pool,), {"ConnectionCls": connection})


class _Punctual:
    """What is added to a connection of urllib3."""

    timeout: float  # seconds; urllib3 sets it before it connects, and again before it waits for an answer
    response_class: Any
    _is_watch = False

    def connect(self) -> None:
        """Connect. A proxy's answer has a deadline too."""
        self._set_deadline()
        super().connect()  # type: ignore[misc]

    def request(self, method: str, url: str, *args: Any, **options: Any) -> None:
        """Send a request."""
        self._is_watch = parse_qs(urlsplit(url).query).get("watch") == ["true"]
        super().request(method, url, *args, **options)  # type: ignore[misc]

    def getresponse(self) -> Any:
        """Wait for the headers of the answer."""
        self._set_deadline()
        return super().getresponse()  # type: ignore[misc]

    def _set_deadline(self) -> None:
        until = time.monotonic() + self.timeout
        self.response_class = partial(_Answer, until=until, is_endless=self._is_watch)


class _Answer(HTTPResponse):
    """An answer that has to be there by `until` (monotonic clock). Of an endless one, the headers have to be there."""

    def __init__(self, sock: socket.socket, *args: Any, until: float, is_endless: bool, **options: Any) -> None:
        self._reader = _Reader(sock, until)
        self._is_endless = is_endless
        super().__init__(self._reader, *args, **options)  # type: ignore[arg-type]  # of a socket it takes makefile()

    def begin(self) -> None:
        """Read the headers."""
        super().begin()
        if self._is_endless:
            self._reader.lift_deadline()


class _Reader(io.RawIOBase):
    """Reads a socket, until a deadline while there is one. Raises TimeoutError."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._socket = sock
        self._file = sock.makefile("rb", buffering=0)
        self._timeout = sock.gettimeout()
        self._until: float | None = until

    def makefile(self, *_: Any) -> io.BufferedReader:
        """What an HTTPResponse reads from."""
        return io.BufferedReader(self)

    def lift_deadline(self) -> None:
        """From now on, each read has the timeout that the socket had."""
        self._until = None
        self._socket.settimeout(self._timeout)

    def readable(self) -> bool:
        """As every reader is."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Wait for some bytes."""
        if self._until is not None:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        """Let go of the socket, which its connection may keep."""
        super().close()
        self._file.close()
