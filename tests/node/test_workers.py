"""ADDs that wait for the API server keep no other verb waiting, nor the agent's end."""

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import pytest

from cni import protocol
from tests.lab.apiserver import ApiServer
from tests.lab.node import Node

ADDS = 60  # more than an agent answers at once


def request(command: str, number: int = 0) -> dict[str, Any]:
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-{number};K8S_POD_UID={number}"
    config = {"cniVersion": "1.1.0", "name": "net", "type": "sidestep-cni", "cni.dev/valid-attachments": []}
    told = {"container_id": f"c{number}", "ifname": "eth0", "netns": "", "args": args}
    return {"version": 1, "command": command, **told, "config": config}


def asked(node: Node, document: dict[str, Any], stack: ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
    connection.settimeout(20)
    connection.connect(str(node.run_dir / protocol.SOCKET_NAME))
    connection.sendall(protocol.encode(document))
    return connection


@pytest.mark.claim("CHECK, DEL, STATUS and GC have workers of their own")
def test_status_del_and_gc_are_answered_while_adds_wait_and_sigterm_ends_all() -> None:
    with ApiServer().running() as api, Node(api=api) as node, ExitStack() as stack:
        api.answering.clear()
        for number in range(ADDS):
            asked(node, request("ADD", number), stack)
        time.sleep(0.5)
        for command in ("STATUS", "DEL", "GC"):
            started = time.monotonic()
            answer = json.loads(protocol.receive_message(asked(node, request(command), stack))[0])
            assert answer["exit"] == 0, answer
            assert time.monotonic() - started < 1.5
        started = time.monotonic()
        node.agent.terminate()
        assert time.monotonic() - started < 25
