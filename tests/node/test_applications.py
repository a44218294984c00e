"""Real programs as applications. At `proxy` they notice nothing; at `full` what docs/acceleration.md says they do."""

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpf.layout import LEVELS
from tests.lab.inside import PYTHON
from tests.lab.levels import redirected_bytes, set_level
from tests.lab.pod import Pod
from tests.lab.traffic.program import PORT, Load, calling, serving
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

SOURCES = Path(__file__).parents[1] / "lab" / "applications"
BEHIND, NGINX, MPTCP, READS = 7001, 7002, 7005, 7006  # ports; what is not HTTP, or speaks first, is at PORT
BIG = 1_000_000
REDIRECTED = 512 * 1024  # BACKLOG_BUDGET of message.c
UPLOAD = 8_000_000  # more than an application's proxy may be ahead of it past TCP
TRIES = 3  # for what goes wrong as documented, most of the time
SPLICE = "option splice-request\n    option splice-response"
UNHARMED = [level for level in LEVELS if level != "full"]

# Requests on one connection, of the kinds and sizes given; prints how many were answered well within five seconds each.
CLIENT = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)
good = 0
for method, path, sent, wanted in json.loads(sys.argv[3]):
    try:
        connection.request(method, path, b"x" * sent)
        body = connection.getresponse().read()
    except OSError:
        break
    good += len(body) == wanted if method == "GET" else body == b"%d" % sent
print(good)
"""

# Messages of 1000 bytes; prints what the reader says is available of each.
MESSAGES = """
import json, socket, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
lines, seen = connection.makefile("r"), []
for _ in range(int(sys.argv[3])):
    connection.sendall(b"x" * 1000)
    seen.append(int(lines.readline()))
    assert lines.readline() == "read\\n"
    time.sleep(0.06)  # longer than any acknowledgement is delayed
    if len(seen) == int(sys.argv[3]) // 2:
        print(json.dumps(seen), flush=True)
        sys.stdin.readline()
print(json.dumps(seen[len(seen) // 2:]), flush=True)
"""


# Reads a start and lets the writer go ahead, then reads twice at once, as much as there is; prints what each has got.
READER = """
import json, select, socket, sys, time
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
connection = listener.accept()[0]
connection.setblocking(False)
select.select([connection], [], [], 10)
assert len(connection.recv(1000)) == 1000
connection.sendall(b"2")
time.sleep(1)
got = [len(connection.recv(1 << 22))]
try:
    got.append(len(connection.recv(1 << 22)))
except BlockingIOError:
    got.append(0)
print(json.dumps(got))
"""

# More than is redirected to a reader that does not read.
WRITER = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.sendall(bytes(1000))
assert connection.recv(1) == b"2"
connection.sendall(bytes(2_000_000))
time.sleep(20)
"""


@contextmanager
def running(pod: Pod, port: int, argv: list[Any], **options: Any) -> Iterator[Path]:
    """A program in the pod that listens at `port`; yields the directory that is its own."""
    process = pod.popen(argv, stdin=subprocess.DEVNULL, **options)
    try:
        wait_until(lambda: bool(_listening(pod, port)), f"{argv[0]} to listen", 20)
        yield pod.directory
    finally:
        process.kill()
        process.wait()


def _listening(pod: Pod, port: int, *kind: str) -> str:
    argv = ["nsenter", f"--net={pod.netns}", "ss", "-Hltn", *kind, f"sport = :{port}"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def directory(fast_mesh: Mesh) -> Path:
    """Where applications of beta may write."""
    made = fast_mesh.beta.directory / "files"
    made.mkdir(exist_ok=True)
    made.chmod(0o777)
    return made


def configured(directory: Path, name: str, **values: str) -> str:
    """A configuration file with its values; its path."""
    text = (SOURCES / name).read_text().replace("DIRECTORY", str(directory))
    for key, value in values.items():
        text = text.replace(key, value)
    (directory / name).write_text(text)
    return str(directory / name)


def http(mesh: Mesh, port: int, requests: list[tuple[str, str, int, int]]) -> int:
    return int(mesh.alpha.python(CLIENT, mesh.beta.ip4, port, json.dumps(requests)))


def proxied(mesh: Mesh) -> None:
    """Streams through the proxies and the HAProxy to a server behind it."""
    with serving(mesh.beta, BEHIND) as server, calling(mesh.alpha, mesh.beta.ip4, Load(seconds=1, seed=8)) as client:
        asked, answered = client.finish(10), server.finish(10)
    assert (asked.sent, asked.received) == (answered.received, answered.sent)


@contextmanager
def haproxy(mesh: Mesh, directory: Path, option: str) -> Iterator[None]:
    argv = ["haproxy", "-db", "-f", configured(directory, "haproxy.cfg", OPTION=option)]
    with running(mesh.beta, PORT, argv):
        yield


def spliced_bytes(directory: Path) -> int:
    with socket.socket(socket.AF_UNIX) as stats:
        stats.connect(str(directory / "haproxy.sock"))
        stats.sendall(b"show info\n")
        lines = stats.makefile().read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("TotalSplic")))


@pytest.mark.parametrize("option", ["no option splice-auto", SPLICE], ids=["copying", "splicing"])
@pytest.mark.parametrize("level", UNHARMED)
def test_haproxy(fast_mesh: Mesh, directory: Path, level: str, option: str) -> None:
    set_level(fast_mesh.node, level)
    with haproxy(fast_mesh, directory, option):
        proxied(fast_mesh)
        assert (spliced_bytes(directory) > BIG) == (option == SPLICE)


def test_haproxy_that_splices_is_not_for_full(fast_mesh: Mesh, directory: Path) -> None:
    """Without splicing it isn't either, as it takes a short read for the end; but that it meets only now and then."""
    set_level(fast_mesh.node, "full")
    with haproxy(fast_mesh, directory, SPLICE), pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        for _ in range(TRIES):
            proxied(fast_mesh)


def test_a_short_read_at_full_is_not_all_there_is(fast_mesh: Mesh) -> None:
    set_level(fast_mesh.node, "full")
    reader = fast_mesh.beta.popen([*PYTHON, READER, str(READS)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "ready\n"
    writer = fast_mesh.alpha.popen([*PYTHON, WRITER, str(fast_mesh.beta.ip4), str(READS)])
    try:
        first, second = json.loads(reader.communicate(timeout=20)[0])
        assert REDIRECTED <= first < 2 * REDIRECTED
        assert second > 0  # by TCP, and there all the time: reading what was redirected makes no room there
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("level", LEVELS)
def test_nginx(fast_mesh: Mesh, directory: Path, level: str) -> None:
    set_level(fast_mesh.node, level)
    (directory / "big").write_bytes(b"x" * BIG)
    requests = [("GET", "/big", 0, BIG), ("POST", "/upload", 2_000, 0)] * 50
    uploads = [("POST", "/upload", UPLOAD, 0)] * TRIES
    with running(fast_mesh.beta, NGINX, ["nginx", "-c", configured(directory, "nginx.conf")]):
        assert http(fast_mesh, NGINX, requests) == len(requests)
        before = redirected_bytes(fast_mesh.alpha)
        answered = http(fast_mesh, NGINX, uploads)
        assert (answered == len(uploads)) == (level != "full"), answered
        assert (redirected_bytes(fast_mesh.alpha) > before) == (level != "off")


@pytest.mark.parametrize("level", LEVELS)
def test_java_asks_what_is_available(fast_mesh: Mesh, directory: Path, level: str) -> None:
    set_level(fast_mesh.node, level)
    (directory / "Available.java").write_text((SOURCES / "Available.java").read_text())
    with running(fast_mesh.beta, PORT, ["java", str(directory / "Available.java"), str(PORT), "1000"]):
        argv = [*PYTHON, MESSAGES, str(fast_mesh.beta.ip4), str(PORT), "6"]
        client = fast_mesh.alpha.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        seen = json.loads(client.stdout.readline())
        set_level(fast_mesh.node, "off")
        seen += json.loads(client.communicate("\n", timeout=20)[0])
    if level != "full":
        assert seen == [1000] * 6
    else:  # by TCP too, as Java's reads block; whether the kernel counts it depends on its version
        assert seen in ([0] * 6, [1000] * 6)


@pytest.mark.parametrize("level", LEVELS)
def test_a_multipath_listener(fast_mesh: Mesh, level: str) -> None:
    set_level(fast_mesh.node, level)
    source = (SOURCES.parent / "app.py").read_text()
    argv = ["mptcpize", "run", *PYTHON, source, "multipath", str(MPTCP)]
    with running(fast_mesh.beta, MPTCP, argv, stdout=subprocess.DEVNULL):
        assert _listening(fast_mesh.beta, MPTCP, "-M")
        for ip in fast_mesh.beta.ips:
            assert fast_mesh.alpha.curl(ip, MPTCP).pod == "multipath"
        assert http(fast_mesh, MPTCP, [("GET", f"/?bytes={BIG}", 0, BIG)] * 20) == 20
