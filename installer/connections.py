"""Sends connections through the programs, for the probe: in a cgroup, network namespace and bpffs made for that.

A child process has all of it in namespaces of its own, so nothing outlives it, however it ends; only an empty cgroup
may, which the next probe removes.
"""

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address, ip_network
from pathlib import Path

from bpf.attachment import attach
from bpf.compiler import try_each
from bpf.errors import KernelRefused
from bpf.kernel import attach_point
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from bpf.pins import Descriptor, Pins
from bpf.probing.features import Verdict
from bpf.tables import Tables
from installer.findings import Row
from installer.settings import Attachment

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWNET = 0x20000, 0x40000000  # uapi/linux/sched.h
_RECURSIVE_PRIVATE = 0x44000  # MS_REC | MS_PRIVATE, uapi/linux/mount.h
_SO_ORIGINAL_DST = 80  # uapi/linux/netfilter_ipv4.h
_PROXY = 1337
_RESOLVER_PORT = 15053
_LO = 1
# documentation addresses (RFC 5737), which lead nowhere but into this namespace
_POD, _CLIENT, _CLIENTS = "192.0.2.1", "203.0.113.9", "203.0.113.0/24"
_SERVER, _NAMESERVER = ("198.51.100.1", 80), ("198.51.100.53", 53)
_PREFIX = "sidestep-probe-"
_SECONDS = 2.0
_CHILD_SECONDS = 30


def exercise(attachment: Attachment) -> Iterator[Row]:
    """A row for each thing that was tried."""
    with _scratch_cgroup(attachment.cgroup or attach_point()) as cgroup:
        argv = [sys.executable, "-m", "installer.connections", str(cgroup)]
        root = Path(__file__).parents[1]
        try:
            child = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=_CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            yield Row("trial", "everything", f"did not end within {_CHILD_SECONDS} s", Verdict.NO, "report it")
            return
    if child.returncode != 0:
        said = " ".join(child.stderr.strip().splitlines()[-1:])
        yield Row("trial", "everything", said or "ended without a word", Verdict.NO, "the rows above may say why")
        return
    for what, needed_by, found, works in json.loads(child.stdout):
        advice = "" if works else "this kernel does not do what its documentation says: report it"
        yield Row(what, needed_by, found, Verdict.YES if works else Verdict.NO, advice)


def load_each(attachment: Attachment) -> dict[str, str]:
    """Hook → why its program is refused, empty when it loads. Raises CompileFailed."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=attachment.bpffs) as scratch:
        return try_each(Path(scratch))


@contextmanager
def _scratch_cgroup(parent: Path) -> Iterator[Path]:
    for left in parent.glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{left.name.removeprefix(_PREFIX)}").exists():
            with suppress(OSError):
                left.rmdir()
    made = parent / f"{_PREFIX}{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        raise KernelRefused(f"cgroup {made}: {error.strerror}") from error
    try:
        yield made
    finally:
        with suppress(OSError):
            (made / "cgroup.kill").write_text("1")
        for _ in range(100):
            with suppress(OSError):
                made.rmdir()
                break
            os.sched_yield()


def _child(cgroup: Path) -> list[tuple[str, str, str, bool]]:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    _enter_namespaces()
    with ExitStack() as stack:
        bpffs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX)))
        _mount(b"bpf", bpffs, b"bpf", 0)
        stack.callback(_LIBC.umount, os.fsencode(bpffs))
        pins = Pins(bpffs)
        attach(pins, cgroup)
        tables = stack.enter_context(Tables(pins))
        _enrol(pins, tables)
        ready, done = os.pipe()
        proxy = os.fork()
        if proxy == 0:
            _be_proxy(done)
        stack.callback(os.waitpid, proxy, 0)
        stack.callback(os.kill, proxy, 9)
        os.close(done)
        os.read(ready, 1)
        return [_try(*trial) for trial in _TRIALS]


def _enter_namespaces() -> None:
    if _LIBC.unshare(_NEWNS | _NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    _mount(b"none", Path("/"), None, _RECURSIVE_PRIVATE)


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int) -> None:
    if _LIBC.mount(source, os.fsencode(target), kind, flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: " + os.strerror(ctypes.get_errno()))


def _enrol(pins: Pins, tables: Tables) -> None:
    """Make this very namespace a pod with default annotations and DNS capture."""
    from cni.annotations import CapturePolicy
    from cni.enroll import Enrolments
    from cni.entries import Identity, entries_of
    from cni.plumbing import prepare
    from cni.rtnl import LOCAL_TABLE, Rtnl
    from cni.sandbox import look

    _bring_up_lo()
    with Rtnl() as rtnl:
        rtnl.add_address(ip_address(_POD), _LO)
        rtnl.make_local(ip_network(_CLIENTS), _LO, LOCAL_TABLE, None)
        sandbox = look(rtnl)
        prepare(rtnl, sandbox, False, False)
    identity = Identity("probe", "probe", "probe", "probe", "", "lo")
    policy = CapturePolicy(dns_capture=True)
    with Descriptor(os.open("/proc/self/ns/net", os.O_RDONLY)) as netns:
        entries = entries_of(identity, policy, sandbox, (_PROXY, _PROXY))
        Enrolments(pins, tables).add(sandbox.cookie, entries, netns.fd)


def _bring_up_lo() -> None:
    """SIOCGIFFLAGS, SIOCSIFFLAGS (uapi/linux/sockios.h) with IFF_UP."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(control, 0x8913, request)
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | 1)
        fcntl.ioctl(control, 0x8914, request)


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
    good = (listener, original, source, peer) == (OUTBOUND_PORT, wanted, _POD, wanted)
    return f"proxy sees {original} from {source}, the application {peer}", good


def _inbound() -> tuple[str, bool]:
    with socket.create_connection((_POD, 8080), _SECONDS, (_CLIENT, 0)) as client:
        listener, original, source = json.loads(client.recv(512))
    return f"proxy sees {original} from {source}", (listener, original, source) == (
        INBOUND_PORT,
        f"{_POD}:8080",
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
