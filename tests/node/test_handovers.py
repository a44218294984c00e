"""The original destination of a captured connection gets lost on its way to the proxy: that is counted and told."""

import json
import subprocess

import pytest

from bpf.pins import Pins
from bpf.tables import Tables
from tests.lab.command import sidestep
from tests.lab.envoy import PROXY_ID
from tests.lab.inside import PYTHON
from tests.lab.node import Node
from tests.node.sidestep import document
from tests.node.test_observation import scrape
from tests.node.test_status import options

# A listener that the kernel gives a connection only once data has come: so there is a moment to lose its destination.
PROXY = """
import socket, sys
with socket.socket() as listener:
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    listener.bind(("0.0.0.0", 15001))
    listener.listen()
    print("ready", flush=True)
    for _ in range(2):
        connection, _ = listener.accept()
        told = connection.getsockopt(socket.SOL_IP, 80, 16)  # SO_ORIGINAL_DST
        print(socket.inet_ntoa(told[4:8]), int.from_bytes(told[2:4], "big"), flush=True)
        connection.sendall(b"taken")
        connection.close()
"""
CLIENT = """
import socket, sys
with socket.create_connection(("192.0.2.1", 80), 10) as connection:
    print("connected", flush=True)
    sys.stdin.readline()
    connection.sendall(b"x")
    print(connection.recv(5).decode(), flush=True)
"""


def connect(node: Node, is_lost: bool) -> None:
    pod = node.pods["alpha"]
    client = pod.popen([*PYTHON, CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout.readline() == "connected\n"
    if is_lost:
        with Tables(Pins(node.bpffs)) as tables:
            for key in list(tables.handshakes.every_key()):
                assert tables.handshakes.remove(key)
    assert client.communicate("\n", timeout=10)[0] == "taken\n"


@pytest.mark.claim("SO_ORIGINAL_DST answers the proxy's own port")
def test_a_lost_original_destination_is_told_of_the_pod_that_lost_it(node: Node) -> None:
    alpha = node.pod("alpha", envoy=False)
    node.pod("beta", envoy=False)
    proxy = alpha.popen([*PYTHON, PROXY], PROXY_ID, stdout=subprocess.PIPE, text=True)
    assert proxy.stdout.readline() == "ready\n"
    connect(node, is_lost=False)
    assert proxy.stdout.readline() == "192.0.2.1 80\n"
    assert {each["lost_handovers"] for each in document(node, "pods")} == {0}
    assert "hand-overs" not in sidestep(node, "status", *options(node)[2:]).stdout
    connect(node, is_lost=True)
    assert proxy.communicate(timeout=10)[0].split()[1] == "15001"  # its own port, which no proxy forwards to
    assert {each["pod"]: each["lost_handovers"] for each in document(node, "pods")} == {
        "default/alpha": 1,
        "default/beta": 0,
    }
    found = json.loads(sidestep(node, "status", *options(node)[2:], "--output", "json").stdout)
    assert [each["lost_handovers"] for each in found["pods"]] == [1, 0]
    told = "captured connections have reached their proxy WITHOUT original destination: default/alpha 1"
    assert f"· hand-overs: {told}" in sidestep(node, "status", *options(node)[2:]).stdout.splitlines()
    words = "1 captured connections reached the proxy WITHOUT their original destination"
    assert words in sidestep(node, "pods", "alpha", "--pods", node.pods_dir).stdout
    assert scrape(node)["sidestep_lost_handovers_total",] == 1
    alpha.stop()
    assert scrape(node)["sidestep_lost_handovers_total",] == 1  # a counter does not fall
