"""The health and metrics ports answer whoever asks, whatever others do there."""

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from installer.agent.health import Readiness
from installer.agent.serving import serving


@pytest.fixture
def port() -> Iterator[int]:
    with serving(0, Readiness().answers(), "health") as found:
        yield found


def health(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        return int(answer.status)


def half_a_request(port: int, stack: ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
    connection.sendall(b"GET /healthz HT")
    return connection


@pytest.mark.claim("32 are served at once, and one more ends the oldest")
def test_hundreds_who_ask_half_a_question_keep_nobody_from_an_answer_and_few_threads_busy(port: int) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        for number in range(500):
            half_a_request(port, stack)
            if number % 100 == 99:
                assert health(port) == 200
                assert threading.active_count() - before < 64


@pytest.mark.claim("An exchange ends after 5 s")
def test_a_question_that_trickles_in_ends_as_a_whole(port: int) -> None:
    with ExitStack() as stack:
        connection = half_a_request(port, stack)
        connection.settimeout(0.5)
        started = time.monotonic()
        while time.monotonic() - started < 15:
            try:
                connection.sendall(b"x")
                if not connection.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 4 < time.monotonic() - started < 9
