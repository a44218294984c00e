"""`sidestep flows`: what pods' connections through real proxies carry, and with whom."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.command import sidestep, sidestep_json
from tests.lab.levels import set_level
from tests.lab.node import Node
from tests.lab.pod import APP_PORT, APP_TCP_PORT
from tests.lab.waiting import wait_until
from tests.node.test_observation import scrape

# connects, says how many bytes it has sent and got of an HTTP exchange
ASK = """
import json, socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
said = b"GET / HTTP/1.1\\r\\nHost: there\\r\\nConnection: close\\r\\n\\r\\n"
s.sendall(said)
got = b""
while piece := s.recv(65536):
    got += piece
s.close()
print(json.dumps([len(said), len(got)]))
"""
# many requests on one connection
KEEP_ASKING = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]))
for _ in range(200):
    connection.request("GET", "/")
    connection.getresponse().read()
print(json.dumps("done"))
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod("alpha")
        made.pod("beta")
        made.pod("gamma", mesh=False)
        yield made


def flows(node: Node, name: str) -> dict[str, Any]:
    found = sidestep_json(node, "flows", name)
    assert isinstance(found, dict)
    return found


def test_a_captured_exchange_is_in_the_callers_list_and_the_callees(node: Node) -> None:
    alpha, beta = node.pods["alpha"], node.pods["beta"]
    sent, got = alpha.python(ASK, beta.ip4, APP_PORT)
    peer = f"{beta.ip4}:{APP_PORT}"
    wait_until(
        lambda: any(each["peer"] == peer and each["closed"] for each in flows(node, "alpha")["flows"]), "its end"
    )
    (row,) = (each for each in flows(node, "alpha")["flows"] if each["direction"] == "outbound")
    assert (row["peer"], row["verdict"], row["open"], row["closed"]) == (peer, "captured", 0, 1)
    assert (row["sent_bytes"], row["received_bytes"]) == (sent, got)
    assert 0 < row["rtt_seconds"] < 1 and 0 < row["duration_seconds"] < 60
    inbound = [each for each in flows(node, "beta")["flows"] if each["port"] == APP_PORT]
    assert [each["direction"] for each in inbound] == ["inbound"]
    assert inbound[0]["received_bytes"] >= 1 and inbound[0]["sent_bytes"] >= 1
    text = sidestep(node, "flows", "alpha").stdout
    assert peer in text and "the way to the pod's own proxy" in text
    assert flows(node, "alpha")["not_told"] == []


def test_all_pods_have_a_line_and_options_are_as_elsewhere(node: Node) -> None:
    assert {each["pod"] for each in sidestep_json(node, "flows")} == {"default/alpha", "default/beta"}
    assert sidestep_json(node, "flows", "-n", "elsewhere") == []
    table = sidestep(node, "flows", "-A").stdout
    assert "default    alpha" in table and max(map(len, table.splitlines())) <= 80
    assert "OUT-SENT" in sidestep(node, "flows", "-o", "wide").stdout
    assert "NAME" not in sidestep(node, "flows", "--no-headers").stdout
    assert "pod: default/alpha" in sidestep(node, "flows", "alpha", "-o", "yaml").stdout
    assert sidestep(node, "flows", "nobody").returncode == 1


def test_the_map_of_sums_has_both_directions_apart(node: Node) -> None:
    text = sidestep(node, "maps", "flow_sums").stdout
    assert "outbound.sent" in text and "inbound.sent" in text


def test_the_counts_are_there_without_the_agent(node: Node) -> None:
    node.pods["alpha"].python(ASK, node.pods["beta"].ip4, APP_PORT)
    node.agent.terminate()
    try:
        assert flows(node, "alpha")["outbound"]["closed"] >= 1
    finally:
        node.agent.start()


def test_prometheus_is_told(node: Node) -> None:
    name = ("sidestep_closed_connections_bytes_total", "outbound", "sent")
    before = scrape(node)[name]
    sent, _ = node.pods["alpha"].python(ASK, node.pods["beta"].ip4, APP_PORT)
    wait_until(lambda: scrape(node)[name] == before + sent, "the bytes to be told")
    after = scrape(node)
    connections = sum(after["sidestep_closed_connections_total", direction] for direction in ("outbound", "inbound"))
    assert after["sidestep_connection_duration_seconds_count",] == connections
    assert after["sidestep_connection_duration_seconds_bucket", "+Inf"] == connections
    assert after["sidestep_connection_duration_seconds_sum",] > 0


def test_without_the_nodes_procfs_open_connections_are_unknown(node: Node, tmp_path: Path) -> None:
    found = sidestep_json(node, "flows", "alpha", "--proc", tmp_path)
    assert found["outbound"]["open"] is None
    assert f"{tmp_path} is no procfs" in found["not_told"][0]


def test_bytes_that_were_redirected_past_tcp_are_said_not_to_be_counted(node: Node) -> None:
    set_level(node, "proxy")
    try:
        node.pods["alpha"].python(KEEP_ASKING, node.pods["beta"].ip4, APP_TCP_PORT)
        found = flows(node, "beta")
        assert found["accelerated_bytes"] > 0
        assert any("past TCP (acceleration)" in each for each in found["not_told"])
    finally:
        set_level(node, "off")
