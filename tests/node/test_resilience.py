"""The agent dies, comes back, and changes its programs while traffic flows."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.envoy import Connection
from tests.lab.inside import PYTHON
from tests.lab.node import REPOSITORY
from tests.lab.pod import APP_TCP_PORT, Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

# New connections, one a request, until stdin closes; one connection is kept open all the while. Prints what happened.
LOAD = """
import json, socket, sys, threading
target, done, failures, requests = (sys.argv[1], int(sys.argv[2])), threading.Event(), [], 0
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()

def request(connection, lines):
    connection.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    length = 0
    while (line := lines.readline()) != b"\\r\\n":
        if not line:
            raise OSError("connection closed")
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return json.loads(lines.read(length))

kept = socket.create_connection(target)
kept_lines = kept.makefile("rb")
request(kept, kept_lines)
print("ready", flush=True)
while not done.is_set():
    try:
        with socket.create_connection(target, 5) as fresh:
            request(fresh, fresh.makefile("rb"))
            if fresh.getpeername() != target:
                failures.append(f"getpeername {fresh.getpeername()}")
        requests += 1
        request(kept, kept_lines)
    except (OSError, ValueError) as error:
        failures.append(repr(error))
print(json.dumps({"requests": requests, "failures": failures[:5], "kept_peer": kept.getpeername()}))
"""


def under_load(mesh: Mesh, disturb: Callable[[], int]) -> None:
    """Disturb the node while alpha talks to beta without a pause; every connection must pass both proxies.

    `disturb` returns how many connections from alpha to beta it has made itself.
    """
    for pod in (mesh.alpha, mesh.beta):
        pod.envoy.connections()
    argv = [*PYTHON, LOAD, str(mesh.beta.ip4), str(APP_TCP_PORT)]
    load = mesh.alpha.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert load.stdout.readline() == "ready\n"
    own = disturb()
    seen: dict[str, Any] = json.loads(load.communicate("", timeout=30)[0])
    assert seen["failures"] == []
    assert seen["requests"] > 20
    assert seen["kept_peer"] == [str(mesh.beta.ip4), APP_TCP_PORT]
    for pod in (mesh.alpha, mesh.beta):
        logged: list[Connection] = []

        def all_logged(pod: Pod = pod, logged: list[Connection] = logged) -> bool:
            logged.extend(pod.envoy.connections())
            return len(logged) >= int(seen["requests"]) + 1 + own

        wait_until(all_logged, f"every connection in {pod.envoy.log}")
        assert len(logged) == seen["requests"] + 1 + own
        assert {each.original for each in logged} == {f"{mesh.beta.ip4}:{APP_TCP_PORT}"}


@pytest.mark.claim("nothing: capture goes on")
def test_killing_the_agent_fails_no_request_and_it_serves_again_at_once(mesh: Mesh) -> None:
    before = mesh.node.policies()

    def disturb() -> int:
        mesh.node.agent.kill()
        assert mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT).pod == "beta"
        mesh.node.agent.start()
        mesh.node.pod("added", app=False, envoy=False).stop()
        return 1

    under_load(mesh, disturb)
    assert mesh.node.policies() == before


def test_terminating_the_agent_changes_nothing(mesh: Mesh) -> None:
    before = mesh.node.policies()
    mesh.node.agent.terminate()
    try:
        assert mesh.node.policies() == before
        mesh.alpha.envoy.connections()
        assert mesh.alpha.curl(mesh.beta.ip6).pod == "beta"
        assert mesh.alpha.envoy.next_connection().listener == "outbound"
    finally:
        mesh.node.agent.start()
    serving = [line for line in mesh.node.agent.log.read_text().splitlines() if "event=agent.serving" in line]
    assert "programs=unchanged" in serving[-1]


def test_programs_are_swapped_under_load(mesh: Mesh, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    for package in ("bpf", "cni", "installer"):
        shutil.copytree(REPOSITORY / package, changed / package, ignore=shutil.ignore_patterns("__pycache__"))
    maps = changed / "bpf" / "maps.h"
    text = maps.read_text()
    assert text.count("0x7f400000") == 1
    maps.write_text(text.replace("0x7f400000", "0x7fc00000").replace("127.64.0.0/10", "127.192.0.0/10"))

    def disturb() -> int:
        mesh.node.agent.terminate()
        mesh.node.agent.start(changed)
        return 0

    under_load(mesh, disturb)
    assert "programs=swapped" in mesh.node.agent.log.read_text()
    mesh.node.agent.terminate()
    mesh.node.agent.start()
    assert mesh.alpha.curl(mesh.beta.ip4).pod == "beta"
