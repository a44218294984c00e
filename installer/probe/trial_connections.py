"""Sends trial connections through the programs, in a cgroup, a network namespace and a bpffs made for that.

A child process is the only pod there, and its own child is the pod's proxy. This finds programs that load but do
nothing, or something wrong.
"""

import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused, SidestepError
from bpf.kernel import capabilities
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from cni.policy.annotations import CapturePolicy
from installer.probe.findings import Finding, Presence
from installer.scratch import POD, POD6, Scratch, scratch_cgroup, scratch_node, scratch_places
from installer.settings import Attachment

_WHAT, _NEEDED_BY = "trial connections", "everything"
_ORIGINAL_DST = 80  # SO_ORIGINAL_DST of SOL_IP, IP6T_SO_ORIGINAL_DST of SOL_IPV6 (uapi/linux/netfilter_ipv4.h, ipv6)
_IPV6_FREEBIND = 78  # uapi/linux/in6.h
_PR_SET_PDEATHSIG = 1  # uapi/linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_PROXY = 1337
_RESOLVER_PORT = 15053
_APPLICATION_PORT = 8080
_SECONDS = 5.0  # timeout of each connection, on a machine on which much else is going on
_CHILD_SECONDS = 60  # it compiles and loads everything; a second or two on an idle machine
_NOT_HERE = 2  # exit status of the child if it may not enter the cgroup or make namespaces

_Trial = Callable[[], tuple[str, bool]]  # what was found, and whether that is right


@dataclass(frozen=True)
class _Family:
    """Addresses of one IP version, all for documentation (RFC 5737, RFC 3849): no packet leaves the namespace."""

    number: socket.AddressFamily
    suffix: str  # of a row's name
    pod: str
    server: tuple[str, int]
    nameserver: tuple[str, int]
    client: str
    clients: str
    first_loopback: str
    any: str


_IPV4 = _Family(
    *(socket.AF_INET, "", POD, ("198.51.100.1", 80), ("198.51.100.53", 53)),
    *("203.0.113.9", "203.0.113.0/24", "127.0.0.1", "0.0.0.0"),
)
_IPV6 = _Family(
    *(socket.AF_INET6, " over IPv6", POD6, ("2001:db8:1::1", 80), ("2001:db8:1::53", 53)),
    *("2001:db8:9::9", "2001:db8:9::/48", "::1", "::"),
)


# CAP_SETGID and CAP_SETUID (uapi/linux/capability.h), which an agent's container does not have
_BEING_SOMEBODY = 1 << 6 | 1 << 7


def trial_connections(attachment: Attachment) -> list[Finding]:
    """A row for each trial. The cgroup for it is made below the attach point, or else below this process's own."""
    if capabilities() & _BEING_SOMEBODY != _BEING_SOMEBODY:
        found = "not tried: without CAP_SETUID and CAP_SETGID nobody can act as the proxy"
        return [Finding(_WHAT, _NEEDED_BY, found, Presence.WARNING, "for the trial, run it as root on the node itself")]
    problem = Finding(_WHAT, _NEEDED_BY, "not tried: no cgroup2", Presence.UNKNOWN, "see the other rows")
    for place in scratch_places(attachment.attach_point()):
        try:
            with scratch_cgroup(place) as cgroup:
                child = _run(cgroup)
        except KernelRefused as error:
            problem = Finding(_WHAT, _NEEDED_BY, f"not tried: {error}", Presence.UNKNOWN, "mount it writable")
        except subprocess.TimeoutExpired:
            return [Finding(_WHAT, _NEEDED_BY, f"did not end within {_CHILD_SECONDS} s", Presence.NO, "report it")]
        else:
            if child.returncode == 0:
                return [_row(*each) for each in json.loads(child.stdout)]
            said = " ".join(child.stderr.strip().splitlines()[-1:]) or "ended without a message"
            problem = Finding(_WHAT, _NEEDED_BY, said, Presence.NO, "the other rows may say why")
            if child.returncode != _NOT_HERE:
                break
    return [problem]


def _run(cgroup: Path) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "installer.probe.trial_connections", str(cgroup)]
    root = Path(__file__).parents[2]
    return subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=_CHILD_SECONDS)


def _row(what: str, needed_by: str, found: str, works: bool) -> Finding:
    advice = "" if works else "report it: this kernel does not do what its documentation says"
    return Finding(what, needed_by, found, Presence.YES if works else Presence.NO, advice)


@contextmanager
def trial_node(cgroup: Path) -> Iterator[Scratch]:
    """Make this process the pod; it can't go back. Raises OSError, SidestepError."""
    policy = CapturePolicy(dns_capture=True, dual_stack=True)
    with scratch_node(cgroup, policy, [_IPV4.clients, _IPV6.clients]) as scratch:
        yield scratch


def connect_as_pod(scratch: Scratch) -> list[tuple[str, str, str, bool]]:
    """Run all trials; returns for each: what was tried, what needs it, what was found, whether that is right.

    The proxy process lives until this returns.
    """
    families = (_IPV4, _IPV6) if scratch.captures_ipv6 else (_IPV4,)
    with ExitStack() as stack:
        ready, done = os.pipe()
        needed, need = os.pipe()
        parent, proxy = os.getpid(), os.fork()
        if proxy == 0:
            os.close(need)
            _be_proxy(families, parent, done, needed)
        stack.callback(os.waitpid, proxy, 0)
        # no signal: without CAP_KILL, which an agent's container lacks, another user's process can't be ended by one
        stack.callback(os.close, need)
        os.close(done)
        os.close(needed)
        stack.callback(os.close, ready)
        os.read(ready, 1)
        return [_try(*trial) for trial in _trials(families, scratch.pins)]


def _be_proxy(families: tuple[_Family, ...], parent: int, ready: int, needed: int) -> None:
    """Be the proxy: answer each connection with its listener's port, original destination and source. Never returns.

    Writes a byte to the descriptor `ready` when it listens. Ends when nobody holds the other end of the pipe `needed`
    any more, and with the process `parent`.
    """
    import selectors

    try:
        os.setgroups([])
        os.setresgid(_PROXY, _PROXY, _PROXY)
        os.setresuid(_PROXY, _PROXY, _PROXY)  # before prctl(): a change of ids resets the death signal
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        with selectors.DefaultSelector() as sockets:
            for family in families:
                for port in (OUTBOUND_PORT, INBOUND_PORT, _APPLICATION_PORT):
                    listener = socket.create_server((family.any, port), family=family.number)
                    sockets.register(listener, selectors.EVENT_READ)
                resolver = socket.socket(family.number, socket.SOCK_DGRAM)
                resolver.bind((family.first_loopback, _RESOLVER_PORT))
                sockets.register(resolver, selectors.EVENT_READ)
            sockets.register(needed, selectors.EVENT_READ)
            os.write(ready, b"x")
            while True:
                for key, _ in sockets.select():
                    if key.fd == needed:
                        os._exit(0)
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
        answer = [waiting.getsockname()[1], _original_of(connection), peer[0]]
        connection.sendall(json.dumps(answer).encode())


def _original_of(connection: socket.socket) -> str:
    """The original destination by SO_ORIGINAL_DST, which gives a sockaddr_in or sockaddr_in6."""
    is_ipv6 = connection.family == socket.AF_INET6
    level, form = (socket.IPPROTO_IPV6, "!2xH4x16s4x") if is_ipv6 else (socket.SOL_IP, "!2xH4s8x")
    try:
        raw = connection.getsockopt(level, _ORIGINAL_DST, struct.calcsize(form))
    except OSError:
        return "nothing"
    port, address = struct.unpack(form, raw)
    return _shown(socket.inet_ntop(connection.family, address), port)


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _trials(families: tuple[_Family, ...], pins: Pins) -> Iterator[tuple[str, str, _Trial]]:
    """The trials: what is tried, what needs it, and the function that tries it."""
    for family in families:
        outbound, inbound, dns = (_bound(trial, family) for trial in (_outbound, _inbound, _dns))
        yield f"an outbound connection{family.suffix}", "outbound capture", outbound
        yield f"an inbound connection{family.suffix}", "inbound capture", inbound
        yield f"a DNS query{family.suffix}", "DNS capture", dns
    yield "a connection of the proxy's own", "telling proxy and application apart", _own
    yield "a swap of programs", "upgrading in place", lambda: _swap(pins)


def _bound(trial: Callable[[_Family], tuple[str, bool]], family: _Family) -> _Trial:
    return lambda: trial(family)


def _try(what: str, needed_by: str, trial: _Trial) -> tuple[str, str, str, bool]:
    try:
        found, works = trial()
    except (OSError, KernelRefused, ValueError) as error:
        found, works = getattr(error, "strerror", "") or str(error), False
    return what, needed_by, found, works


def _outbound(family: _Family) -> tuple[str, bool]:
    with socket.create_connection(family.server, _SECONDS) as app:
        listener, original, source = json.loads(app.recv(512))
        peer = _shown(*app.getpeername()[:2])
    wanted = _shown(*family.server)
    good = (listener, original, source, peer) == (OUTBOUND_PORT, wanted, family.pod, wanted)
    return f"proxy sees {original} from {source}, the application {peer}", good


def _inbound(family: _Family) -> tuple[str, bool]:
    with socket.socket(family.number) as client:
        client.settimeout(_SECONDS)
        if family is _IPV6:  # with IPv6, a local route alone does not allow bind()
            client.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        client.bind((family.client, 0))
        client.connect((family.pod, _APPLICATION_PORT))
        listener, original, source = json.loads(client.recv(512))
    wanted = _shown(family.pod, _APPLICATION_PORT)
    good = (listener, original, source) == (INBOUND_PORT, wanted, family.client)
    return f"{_receiver(listener)} sees {original} from {source}", good


def _dns(family: _Family) -> tuple[str, bool]:
    with socket.socket(family.number, socket.SOCK_DGRAM) as app:
        app.settimeout(_SECONDS)
        app.sendto(b"query", family.nameserver)
        sender = app.recvfrom(512)[1][:2]
    return f"the answer comes from {_shown(*sender)}", sender == family.nameserver


def _own() -> tuple[str, bool]:
    """A socket that the proxy opened and another process connects counts as the proxy's."""
    with _as_proxy():
        opened = socket.socket()
    with opened:
        opened.settimeout(_SECONDS)
        opened.connect((_IPV4.client, _APPLICATION_PORT))
        listener, *_ = json.loads(opened.recv(512))
    return f"{_receiver(listener)} answers", listener == _APPLICATION_PORT


@contextmanager
def _as_proxy() -> Iterator[None]:
    """Open sockets as the proxy: the programs see the real ids; the effective ids keep the capabilities."""
    os.setresgid(_PROXY, -1, -1)
    os.setresuid(_PROXY, -1, -1)
    try:
        yield
    finally:
        os.setresuid(0, -1, -1)
        os.setresgid(0, -1, -1)


def _receiver(port: int) -> str:
    return "the application" if port == _APPLICATION_PORT else "proxy"


def _swap(pins: Pins) -> tuple[str, bool]:
    with (
        Descriptor(syscalls.open_pin(pins.links / "connect4")) as link,
        Descriptor(syscalls.open_pin(pins.programs / "connect4")) as program,
    ):
        syscalls.update_link(link.fd, program.fd, "connect4")
    found, works = _outbound(_IPV4)
    return "in place, and captures" if works else f"in place; then {found}", works


if __name__ == "__main__":
    try:
        with trial_node(Path(sys.argv[1])) as node:
            sys.stdout.write(json.dumps(connect_as_pod(node)))
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_NOT_HERE)
    except SidestepError as error:
        sys.exit(str(error))
