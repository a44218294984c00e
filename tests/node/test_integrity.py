"""Every byte arrives, in its place, whatever the sizes, pauses and changes of level on its way."""

import re
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from bpf.layout import LEVELS
from tests.lab.levels import changing, redirected_bytes, set_level
from tests.lab.traffic.program import Load, calling, program, serving
from tests.node.conftest import Mesh


def assert_all_arrives(mesh: Mesh, ip: object, load: Load) -> int:
    """Streams from alpha to beta, through both proxies, both ways; returns how often blocking calls did not block."""
    with serving(mesh.beta) as server, calling(mesh.alpha, ip, load) as client:
        asked = client.finish()
        answered = server.finish()
    assert (asked.sent, asked.received) == (answered.received, answered.sent)
    assert asked.finished == answered.finished >= load.parallel
    assert (asked.unfinished, answered.unfinished) == (0, 0)
    return asked.again + answered.again


@pytest.mark.parametrize("level", LEVELS)
def test_streams_arrive_to_the_byte(fast_mesh: Mesh, level: str) -> None:
    set_level(fast_mesh.node, level)
    before = redirected_bytes(fast_mesh.alpha)
    again = assert_all_arrives(fast_mesh, fast_mesh.beta.ip4, Load(seconds=2))
    again += assert_all_arrives(fast_mesh, fast_mesh.beta.ip6, Load(seconds=1, pause=0, mean=20_000, seed=2))
    assert level == "full" or again == 0
    redirected = redirected_bytes(fast_mesh.alpha) - before
    assert (redirected > 1_000_000) == (level != "off")


def test_streams_arrive_to_the_byte_while_the_level_changes(fast_mesh: Mesh) -> None:
    before = redirected_bytes(fast_mesh.alpha)
    with changing(fast_mesh.node) as seen:
        assert_all_arrives(fast_mesh, fast_mesh.beta.ip4, Load(seconds=3, seed=3))
    assert len(seen) > 10
    assert redirected_bytes(fast_mesh.alpha) - before > 1_000_000


def relayed(spoil: Callable[[bytearray], bytes]) -> str:
    """What a client says of a stream whose answer's first 64 KiB or more are spoilt on the way."""
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]

    def relay() -> None:
        down, up = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
        with down, up, suppress(ConnectionError):
            threading.Thread(target=_copy, args=(down, up), daemon=True).start()
            start = bytearray()
            while len(start) < 65536:
                start += up.recv(65536)
            down.sendall(spoil(start))
            _copy(up, down)

    threading.Thread(target=relay, daemon=True).start()
    server = subprocess.Popen([program(), "server", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    load = Load(connections=1, parallel=1, mean=2_000_000, pause=0, seed=4).arguments()
    argv = [str(program()), "client", "127.0.0.1", str(listener.getsockname()[1]), *load]
    client = subprocess.run(argv, capture_output=True, text=True, timeout=40)
    server.kill()
    server.communicate()
    listener.close()
    assert client.returncode == 1
    return client.stderr


def _copy(origin: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := origin.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_what_is_wrong_on_the_way_is_noticed() -> None:
    def flipped(start: bytearray) -> bytes:
        start[40000] ^= 1
        return bytes(start)

    def cut(start: bytearray) -> bytes:
        raise ConnectionError

    assert re.search(r"receiving down: wrong; .* are those from -1 on; after 40000 of", relayed(flipped))
    lost = relayed(lambda start: bytes(start[:30000] + start[30100:]))
    assert re.search(r"receiving down: wrong; .* are those from 30100 on; after 30000 of", lost)
    swapped = relayed(lambda start: bytes(start[:100] + start[200:300] + start[100:200] + start[300:]))
    assert re.search(r"receiving down: wrong; .* are those from 200 on; after 100 of", swapped)
    assert re.search("receiving down: (ended|Connection reset)", relayed(cut))
