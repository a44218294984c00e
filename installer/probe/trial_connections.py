"""Sends connections through the programs, for the probe: in a cgroup, network namespace and bpffs made for that.

A child process is the one pod there, and its own child that pod's proxy.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from bpf.compiler import try_each
from bpf.kernel import attach_point
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from bpf.probing.features import Presence
from cni.policy.annotations import CapturePolicy
from installer.probe.findings import Finding
from installer.scratch import POD, scratch_cgroup, scratch_node
from installer.settings import Attachment

_SO_ORIGINAL_DST = 80  # uapi/linux/netfilter_ipv4.h
_PROXY = 1337
_RESOLVER_PORT = 15053
# documentation addresses (RFC 5737), which lead nowhere but into this namespace
_CLIENT, _CLIENTS = "203.0.113.9", "203.0.113.0/24"
_SERVER, _NAMESERVER = ("198.51.100.1", 80), ("198.51.100.53", 53)
_PREFIX = "sidestep-probe-"
_SECONDS = 2.0
_CHILD_SECONDS = 30


def trial_connections(attachment: Attachment) -> Iterator[Finding]:
    """A row for each thing that was tried."""
    with scratch_cgroup(attachment.cgroup or attach_point()) as cgroup:
        argv = [sys.executable, "-m", "installer.probe.trial_connections", str(cgroup)]
        root = Path(__file__).parents[2]
        try:
            child = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=_CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            yield Finding("trial", "everything", f"did not end within {_CHILD_SECONDS} s", Presence.NO, "report it")
            return
    if child.returncode != 0:
        said = " ".join(child.stderr.strip().splitlines()[-1:])
        yield Finding("trial", "everything", said or "ended without a word", Presence.NO, "the rows above may say why")
        return
    for what, needed_by, found, works in json.loads(child.stdout):
        advice = "" if works else "this kernel does not do what its documentation says: report it"
        yield Finding(what, needed_by, found, Presence.YES if works else Presence.NO, advice)


def load_each(attachment: Attachment) -> dict[str, str]:
    """Hook → why its program is refused, empty when it loads. Raises CompileFailed."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=attachment.bpffs) as scratch:
        return try_each(Path(scratch))


def _child(cgroup: Path) -> list[tuple[str, str, str, bool]]:
    with ExitStack() as stack:
        stack.enter_context(scratch_node(cgroup, CapturePolicy(dns_capture=True), [_CLIENTS]))
        ready, done = os.pipe()
        proxy = os.fork()
        if proxy == 0:
            _be_proxy(done)
        stack.callback(os.waitpid, proxy, 0)
        stack.callback(os.kill, proxy, 9)
        os.close(done)
        os.read(ready, 1)
        return [_try(*trial) for trial in _TRIALS]


def _be_proxy(ready: int) -> None:
    """Answers each connection with the destination that it has for it; never returns."""
    import selectors

    try:
        os.setgroups([])
        os.setresgid(_PROXY, _PROXY, _PROXY)
        os.setresuid(_PROXY, _PROXY, _PROXY)
        with selectors.DefaultSelector() as sockets:
            for port in (OUTBOUND_PORT, INBOUND_PORT):
                listener = socket.create_server(("0.0.0.0", port))
                sockets.register(listener, selectors.EVENT_READ)
            resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            resolver.bind(("127.0.0.1", _RESOLVER_PORT))
            sockets.register(resolver, selectors.EVENT_READ)
            os.write(ready, b"x")
            while True:
                for key, _ in sockets.select():
                    _answer(key.fileobj)  # type: ignore[arg-type]
    finally:
        os._exit(1)


def _answer(waiting: socket.socket) -> None:
    if waiting.type == socket.SOCK_DGRAM:
        query, sender = waiting.recvfrom(512)
        waiting.sendto(query, sender)
        return
    connection, peer = waiting.accept()
    with connection:
        raw = connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
        port, address = struct.unpack_from("!2xH4s", raw)
        listener = waiting.getsockname()[1]
        connection.sendall(json.dumps([listener, f"{socket.inet_ntoa(address)}:{port}", peer[0]]).encode())


def _try(what: str, needed_by: str, trial: Callable[[], tuple[str, bool]]) -> tuple[str, str, str, bool]:
    try:
        found, works = trial()
    except OSError as error:
        found, works = error.strerror or str(error), False
    return what, needed_by, found, works


def _outbound() -> tuple[str, bool]:
    with socket.create_connection(_SERVER, _SECONDS) as app:
        listener, original, source = json.loads(app.recv(512))
        peer = "{}:{}".format(*app.getpeername())
    wanted = "{}:{}".format(*_SERVER)
    good = (listener, original, source, peer) == (OUTBOUND_PORT, wanted, POD, wanted)
    return f"proxy sees {original} from {source}, the application {peer}", good


def _inbound() -> tuple[str, bool]:
    with socket.create_connection((POD, 8080), _SECONDS, (_CLIENT, 0)) as client:
        listener, original, source = json.loads(client.recv(512))
    return f"proxy sees {original} from {source}", (listener, original, source) == (
        INBOUND_PORT,
        f"{POD}:8080",
        _CLIENT,
    )


def _dns() -> tuple[str, bool]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as app:
        app.settimeout(_SECONDS)
        app.sendto(b"query", _NAMESERVER)
        sender = app.recvfrom(512)[1]
    return "the answer comes from {}:{}".format(*sender), sender == _NAMESERVER


_TRIALS = (
    ("an outbound connection", "outbound capture", _outbound),
    ("an inbound connection", "inbound capture", _inbound),
    ("a DNS query", "DNS capture", _dns),
)

if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(Path(sys.argv[1]))))
