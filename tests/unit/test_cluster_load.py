"""What the load in the cluster counts as a failure, and what it says of many requests."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.load import client, server
from tests.cluster.load.load import Counts


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    """The server of the load, on loopback, under the kinds that the client knows."""
    servers = {
        "http": server.Http(("::1", 0), server.Seen),
        "lines": server.Lines(("::1", 0), server.Line),
        "first": server.Lines(("::1", 0), server.First),
    }
    for each in servers.values():
        threading.Thread(target=each.serve_forever, args=[0.01], daemon=True).start()
    yield {kind: each.server_address[1] for kind, each in servers.items()}
    for each in servers.values():
        each.shutdown()
        each.server_close()


@pytest.fixture(autouse=True)
def as_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the application is asked from where the proxy would ask it in a pod."""
    monkeypatch.setattr(client, "_PROXY", "::1")
    monkeypatch.setattr("socket.gethostname", lambda: "near")


def flow(kind: str, port: int, **wanted: str) -> dict[str, Any]:
    return {"kind": kind, "host": "::1", "port": port, "server": "near", "identity": "", **wanted}


@pytest.mark.parametrize("kind", ["http", "lines", "first"])
def test_a_right_answer_is_none_and_the_next_one_on_the_connection_too(kind: str, ports: dict[str, int]) -> None:
    connection = client.Flow(flow(kind, ports[kind])).kind(flow(kind, ports[kind]))
    connection.ask()
    connection.ask()
    connection.close()


@pytest.mark.parametrize("kind", ["http", "lines", "first"])
def test_an_answer_of_another_server_is_a_failure(kind: str, ports: dict[str, int]) -> None:
    other = flow(kind, ports[kind], server="far")
    with pytest.raises(client.Wrong, match="answered by near, which was called from ::1"):
        client.Flow(other).kind(other).ask()


@pytest.mark.parametrize("kind", ["http", "lines", "first"])
def test_an_answer_that_came_past_the_proxy_is_a_failure(
    kind: str, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PROXY", "127.0.0.6")
    with pytest.raises(client.Wrong, match="answered by near, which was called from ::1"):
        client.Flow(flow(kind, ports[kind])).kind(flow(kind, ports[kind])).ask()


def test_an_answer_without_the_identity_that_is_wanted_is_a_failure(ports: dict[str, int]) -> None:
    named = flow("http", ports["http"], identity="spiffe://a")
    with pytest.raises(client.Wrong, match="the proxies named nobody"):
        client.Http(named).ask()


def test_what_was_sent_and_failed_before_does_not_count() -> None:
    before = {"a": {"sent": 10, "failed": 3, "failures": ["old"]}, "b": {"sent": 5, "failed": 0, "failures": []}}
    after = {"a": {"sent": 14, "failed": 3, "failures": ["old"]}, "b": {"sent": 25, "failed": 0, "failures": []}}
    assert Counts.of(after, before) == Counts(sent=24, failed=0, least=4)
    after["b"] |= {"failed": 1, "failures": ["12:00:00 refused"]}
    assert Counts.of(after, before).failed == 1
    assert "b 12:00:00 refused" in Counts.of(after, before).failures
