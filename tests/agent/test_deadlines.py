"""Nobody keeps the agent waiting for ever: every exchange ends as a whole, whatever trickles in."""

import socket
import threading
import time
from typing import Any, cast

import pytest

from cni import protocol
from cni.errors import InvalidRequest
from installer.pods.answers import Watching, parse_json
from installer.pods.api_errors import ApiFailed


@pytest.mark.claim("is read within 5 s as a whole")
def test_a_message_that_trickles_in_ends_at_the_connections_timeout() -> None:
    ours, theirs = socket.socketpair()
    ended = threading.Event()

    def trickle() -> None:
        theirs.sendall((1000).to_bytes(4, "big"))
        while not ended.wait(0.1):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    with ours, theirs:
        ours.settimeout(0.5)
        thread.start()
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            protocol.receive_message(ours)
        assert time.monotonic() - started < 2
        ended.set()
        thread.join()


@pytest.mark.claim("A request is at most 8 MiB of JSON")
def test_a_message_that_is_longer_than_any_of_the_plugins_is_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(((8 << 20) + 1).to_bytes(4, "big"))
        with pytest.raises(InvalidRequest, match="the message has 8388609 bytes; send 1 to 8388608"):
            protocol.receive_message(ours)


class Trickling:
    """An answer of the API server whose body never ends."""

    def __init__(self, part: bytes) -> None:
        self._part = part

    def read1(self, _: int) -> bytes:
        return self._part


def test_a_line_of_a_watch_that_does_not_end_is_an_error() -> None:
    watching: Watching[object] = Watching(cast(Any, Trickling(bytes(1 << 20))), lambda thing: thing, 60.0)
    with pytest.raises(ApiFailed, match="a line has more than 16 MiB"):
        list(watching.changes())


def test_json_that_is_nested_too_deeply_is_an_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 1_000_000)
