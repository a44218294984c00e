"""`make halves`: how many connections by mTLS never bring the end of what was sent, at each level.

Envoy tells the end of one direction by TLS's close_notify. It sends that once, and forgets it if the socket's send
buffer is full at that moment (docs/acceleration.md). At `off` on one node that buffer is never full then. So there is
also a link as others have it, slow and with a small send buffer, to see the same without acceleration.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bpf.layout import LEVELS
from tests.lab.demo import exit_on_signals
from tests.lab.inside import PYTHON
from tests.lab.istiod.identities import KeyKind
from tests.lab.istiod.sent import TCP, with_tcp_service
from tests.lab.levels import set_level
from tests.lab.node import Node
from tests.lab.pod import Pod

_BULK = Path(__file__).with_name("bulk.py").read_text()
_AT_ONCE = 40  # calls; few enough for a busy machine to end them in time
_AT_ONCE_SLOW = 8  # so that each has more under way than its send buffer holds
_PAUSE_SECONDS = 0.03  # of a reader after each 256 KiB
_SECONDS = 15  # a call takes two or three
_SEND_BUFFER = 65536  # SO_SNDBUF, of which the kernel makes twice as much
_RATE, _QUEUE = "400mbit", "100ms"


@click.command()
@click.option("--calls", default=1600, help="Connections of each kind.", show_default=True)
@click.option("--only", multiple=True, type=click.Choice([*LEVELS, "slow"]), help="These; may be repeated.")
def halves(calls: int, only: tuple[str, ...]) -> None:
    """A table: of so many connections, how many readers were told the end, and how many wait for ever."""
    exit_on_signals()
    click.echo("| level | link | sender | how the reader's wait ended |\n|---|---|---|---|")
    for level in LEVELS:
        if not only or level in only:
            with _pods(level, slow=False) as (client, server):
                for way, sender in (("up", "the client"), ("down", "the server")):
                    found = _calls(client, server, calls, _AT_ONCE, way, _PAUSE_SECONDS)
                    click.echo(f"| {level} | of one node | {sender} | {_said(found)} |")
    if not only or "slow" in only:
        with _pods("off", slow=True) as (client, server):
            found = _calls(client, server, calls, _AT_ONCE_SLOW, "up", 0)
            click.echo(f"| off | {_RATE}, small send buffer | the client | {_said(found)} |")


@contextmanager
def _pods(level: str, slow: bool) -> Iterator[tuple[Pod, Pod]]:
    """The client's and the server's, with Envoys as istiod configures them; the slow link is the client's."""
    node = Node()
    node.agent.options = ["--acceleration", "off"]
    with node:
        allowed = {"sidestep.io/acceleration": "full"}
        client, server = (node.pod(name, annotations=allowed, app=False, envoy=False) for name in ("client", "server"))
        set_level(node, level)
        for pod in (server, client):
            pod.envoy.key_kind = KeyKind.RSA
            pod.envoy.amend = _with_small_send_buffer if slow and pod is client else with_tcp_service
        if slow:
            _slow_down(client, server)
        for pod in (server, client):
            pod.envoy.start()
        yield client, server


def _with_small_send_buffer(static: dict[str, Any]) -> None:
    with_tcp_service(static)
    option = {"level": 1, "name": 7, "int_value": _SEND_BUFFER, "state": "STATE_PREBIND"}  # SOL_SOCKET, SO_SNDBUF
    for cluster in static["clusters"]:
        if cluster["name"].startswith(f"outbound|{TCP}|"):
            anywhere = {"address": "0.0.0.0", "port_value": 0}
            cluster["upstream_bind_config"] = {"source_address": anywhere, "socket_options": [option]}


def _slow_down(client: Pod, server: Pod) -> None:
    """Have the client's pod send as slowly as many networks do, by a queue of its own.

    By Reno, which fills the queue, so that the send buffer is what limits a connection. BBR, which some machines have,
    would leave the queue short.
    """
    for argv in (
        ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", _RATE, "burst", "64kb", "latency", _QUEUE],
        ["ip", "route", "add", f"{server.ip4}/32", "dev", "eth0", "congctl", "reno"],
    ):
        subprocess.run(["nsenter", f"--net={client.netns}", *argv], check=True)


def _calls(client: Pod, server: Pod, calls: int, at_once: int, way: str, pause: float) -> Counter[str]:
    found = Counter[str]()
    serving = server.popen([*PYTHON, _BULK, "serve", str(TCP), str(pause)], stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout.readline() == "ready\n"
        while (left := calls - found.total()) > 0:
            argv = [*PYTHON, _BULK, "call", server.ip4, TCP, min(left, at_once), way, pause, _SECONDS]
            calling = client.popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True)
            said, _ = calling.communicate()
            found.update(json.loads(said))
    finally:
        serving.kill()
        serving.communicate()
    return found


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{end} {count}" for end, count in sorted(counts.items()))


if __name__ == "__main__":
    halves()
