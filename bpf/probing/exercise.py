"""The trial programs at work: connections and datagrams within a namespace of their own, and what came of them.

Runs in a child that scratch.py makes: in a scratch cgroup, where the programs are attached, and a network namespace
with nothing but lo. A program that loads but does nothing, or not what it should, shows here.
"""

import ctypes
import errno
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bpf import syscalls
from bpf.compiler import NETNS_HOOK
from bpf.errors import KernelRefused
from bpf.layout import Quad, Word
from bpf.probing import loading
from bpf.probing.scratch import join_cgroup, own_netns
from bpf.probing.trials import (
    ASKED,
    ASKED4,
    ASKED6,
    BY_PROGRAM,
    BY_USER,
    INBOUND,
    LOOPBACK4,
    LOOPBACK6,
    MARK,
    NAMESERVER,
    ORIGINAL_DST,
    OUTBOUND,
    RESOLVER,
    SOURCE4,
    STEERED,
    STEERED4,
    Note,
    TrialTables,
)
from bpf.syscalls import Descriptor

_SO_NETNS_COOKIE = 71  # uapi/asm-generic/socket.h
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # uapi/linux/sockios.h, if.h
_PIDFD_GETFD = 438  # syscall number, the same on every architecture (asm-generic/unistd.h)
_SECONDS = 1.0  # for anything on lo
_LO = 1  # its interface index in every namespace
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Bench:
    """What the parent has prepared; descriptors, None where the kernel refused."""

    cgroup: Path
    tables: TrialTables
    attached: frozenset[str]  # names of the hooks that have their trial program
    sk_lookup: int | None  # program
    connect4_link: int | None
    idle: int | None  # a connect4 program that does nothing


@dataclass(frozen=True)
class Exercised:
    """Hook or feature → what is wrong with it, "" if nothing; absent if it could not be tried."""

    problems: dict[str, str] = field(default_factory=dict)
    ipv6: bool = True


@dataclass(frozen=True)
class _Family:
    """The addresses of one family as socket.connect() takes them, and the suffix of its hooks."""

    number: socket.AddressFamily
    suffix: str
    asked: str
    loopback: str
    source: str
    any: str


_FAMILIES = (
    _Family(socket.AF_INET, "4", ASKED4, LOOPBACK4, SOURCE4, "0.0.0.0"),
    _Family(socket.AF_INET6, "6", ASKED6, LOOPBACK6, LOOPBACK6, "::"),
)


class _Wrong(Exception):
    """A program did not do what it is for."""


def exercise_trials(bench: Bench) -> tuple[dict[str, str], bool]:
    """The fields of Exercised. Raises OSError or KernelRefused when there is no place to try anything.

    Enters the scratch cgroup and a new network namespace for good: to be run in a child.
    """
    join_cgroup(bench.cgroup)
    own_netns()
    _lo_up()
    ipv6 = _has_ipv6()
    problems: dict[str, str] = {}
    for names, act in _acts(bench, _FAMILIES if ipv6 else _FAMILIES[:1]):
        try:
            act()
            problem = ""
        except (_Wrong, OSError, KernelRefused) as error:
            problem = str(error)
        for name in names:
            problems[name] = problems.get(name) or problem
    return problems, ipv6


def _acts(bench: Bench, families: tuple[_Family, ...]) -> Iterator[tuple[tuple[str, ...], Callable[[], None]]]:
    """What to try, in order, and the hooks or features it tells about."""
    has = bench.attached
    if "sock_create" in has:
        yield ("sock_create",), lambda: _creator_is_known(bench)
        yield ("SO_NETNS_COOKIE",), lambda: _cookies_agree(bench)
    for family in families:
        connect, name = f"connect{family.suffix}", f"getpeername{family.suffix}"
        if connect in has:
            yield (connect,), lambda family=family: _captured(bench, family)  # type: ignore[misc]
        if {connect, name} <= has:
            yield (name,), lambda family=family: _real_name_shown(family)  # type: ignore[misc]
        if f"post_bind{family.suffix}" in has:
            yield (f"post_bind{family.suffix}",), lambda family=family: _bind_seen(bench, family)  # type: ignore[misc]
        query, reply = f"sendmsg{family.suffix}", f"recvmsg{family.suffix}"
        if query in has:
            yield (query,), lambda family=family: _query_redirected(family)  # type: ignore[misc]
        if {query, reply} <= has:
            yield (reply,), lambda family=family: _reply_renamed(family)  # type: ignore[misc]
    if "sockops" in has:
        yield ("sockops",), lambda: _ends_are_seen(bench)
    if "getsockopt" in has:
        yield ("getsockopt",), lambda: _original_answered(bench)
    if bench.sk_lookup is not None:
        steering = bench.sk_lookup
        yield ("sk_lookup",), lambda: _steered(bench, steering, families[-1])
    yield ("pidfd_getfd",), lambda: _adopted(bench)
    if bench.connect4_link is not None and bench.idle is not None:
        link, idle = bench.connect4_link, bench.idle
        yield ("bpf_link",), lambda: _swapped(link, idle)
    yield ("locked memory",), _maps_without_locked_memory


def _creator_is_known(bench: Bench) -> None:
    with _tcp(_FAMILIES[0]):
        _expect("bpf_get_current_uid_gid", _noted(bench, Note.CALLER), os.getgid() << 32 | os.getuid())
        _expect("bpf_get_current_cgroup_id", _noted(bench, Note.CGROUP), bench.cgroup.stat().st_ino)


def _cookies_agree(bench: Bench) -> None:
    with _tcp(_FAMILIES[0]) as sock:
        cookie = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    _expect("bpf_get_netns_cookie", _noted(bench, Note.COOKIE_SOCK), int.from_bytes(cookie, "little"))


def _captured(bench: Bench, family: _Family) -> None:
    with _listening(OUTBOUND) as proxy, _tcp(family) as client:
        client.connect((family.asked, ASKED))
        accepted, source = proxy.accept()
        accepted.close()
    _expect("the source that bpf_bind chose", source[0].removeprefix("::ffff:"), family.source)
    if "sock_create" in bench.attached:
        _expect("what sock_create left with the socket", _noted(bench, Note.STORED), MARK)
    _expect("bpf_get_netns_cookie", _noted(bench, Note.COOKIE_ADDR), _noted(bench, Note.COOKIE_SOCK))


def _real_name_shown(family: _Family) -> None:
    with _listening(OUTBOUND), _tcp(family) as client:
        client.connect((family.asked, ASKED))
        _expect("getpeername()", client.getpeername()[:2], (family.asked, ASKED))


def _bind_seen(bench: Bench, family: _Family) -> None:
    syscalls.map_delete(bench.tables.notes, Word(Note.BOUND))
    with _tcp(family) as sock:
        sock.bind((family.loopback, INBOUND))
    _expect("the bind() that post_bind saw", _noted(bench, Note.BOUND), 1)


def _query_redirected(family: _Family) -> None:
    with _udp(family) as resolver, _udp(family) as client:
        resolver.bind((family.loopback, RESOLVER))
        client.sendto(b"?", (family.asked, NAMESERVER))
        _expect("the source of the query", resolver.recvfrom(1)[1][0], family.source)


def _reply_renamed(family: _Family) -> None:
    with _udp(family) as resolver, _udp(family) as client:
        resolver.bind((family.loopback, RESOLVER))
        client.sendto(b"?", (family.asked, NAMESERVER))
        resolver.sendto(b"!", resolver.recvfrom(1)[1])
        _expect("the source of the reply", client.recvfrom(1)[1][:2], (family.asked, NAMESERVER))


def _ends_are_seen(bench: Bench) -> None:
    with _listening(INBOUND) as proxy, _tcp(_FAMILIES[0]) as client:
        _expect("bpf_sock_hash_update of a listener", _noted(bench, Note.REGISTERED), 0)
        _expect("a listener in the table", _listener(bench, BY_PROGRAM), True)
        client.connect((LOOPBACK4, INBOUND))
        proxy.accept()[0].close()
        _expect("the connecting end's namespace", _noted(bench, Note.COOKIE_OPS), _noted(bench, Note.COOKIE_SOCK))
        _expect("bpf_sock_ops_cb_flags_set", _noted(bench, Note.CALLBACKS), 0)
        _expect("the accepted end", _noted(bench, Note.ACCEPTED), 1)
    _expect("the listener in the table after it was closed", _listener(bench, BY_PROGRAM), False)


def _original_answered(bench: Bench) -> None:
    with _listening(INBOUND) as proxy, _tcp(_FAMILIES[0]) as client:
        client.connect((LOOPBACK4, INBOUND))
        answer = client.getsockopt(socket.SOL_IP, ORIGINAL_DST, 16)
        proxy.accept()[0].close()
    wanted = struct.pack("=H", socket.AF_INET) + struct.pack("!H", ASKED) + socket.inet_aton(ASKED4)
    _expect("SO_ORIGINAL_DST", answer[:8], wanted)
    _expect("bpf_get_netns_cookie", _noted(bench, Note.COOKIE_SOCKOPT), _noted(bench, Note.COOKIE_SOCK))


def _steered(bench: Bench, program: int, last: _Family) -> None:
    with (
        Descriptor(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as netns,
        Descriptor(syscalls.create_link(program, netns.fd, NETNS_HOOK.attach_type, "own network namespace")),
        _listening(INBOUND) as proxy,
    ):
        _put(bench, BY_PROGRAM, proxy.fileno())  # whatever has become of sockops
        _dial_steered(proxy, _FAMILIES[0], STEERED4)
        _expect("bpf_sk_assign", _noted(bench, Note.ASSIGNED), 0)
        _expect("ingress_ifindex", _noted(bench, Note.INTERFACE), _LO)
        if last.number == socket.AF_INET6:
            _dial_steered(proxy, last, LOOPBACK6)


def _dial_steered(proxy: socket.socket, family: _Family, host: str) -> None:
    with _tcp(family) as client:
        client.connect((host, STEERED))
        accepted, _ = proxy.accept()
        with accepted:
            name = accepted.getsockname()
    _expect("the accepted socket's own address", (name[0].removeprefix("::ffff:"), name[1]), (host, STEERED))


def _adopted(bench: Bench) -> None:
    """A proxy that listened before we came: its socket is fetched from its process and put into the table."""
    with _listening(0) as proxy, Descriptor(os.pidfd_open(os.getpid())) as process:
        fetched = _LIBC.syscall(_PIDFD_GETFD, process.fd, proxy.fileno(), 0)
        if fetched < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        with Descriptor(fetched):
            _put(bench, BY_USER, fetched)
        _expect("the fetched listener in the table", _listener(bench, BY_USER), True)


def _swapped(link: int, idle: int) -> None:
    syscalls.update_link(link, idle, "connect4")
    with _tcp(_FAMILIES[0]) as client:
        number = client.connect_ex((ASKED4, ASKED))
    _expect("connect() after bpf_link_update", errno.errorcode.get(number, "connected"), "ECONNREFUSED")


def _maps_without_locked_memory() -> None:
    """Since 5.11 maps count towards the cgroup's memory; before, towards RLIMIT_MEMLOCK."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))
    os.close(loading.create_map(loading.HASH, 4, 4, 1024, 0, "ssp_locked"))


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """The proxy's stand-in: of both families where there are two."""
    with ExitStack() as opened:
        family = _FAMILIES[1] if _has_ipv6() else _FAMILIES[0]
        listening = opened.enter_context(_tcp(family))
        if family.number == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((family.any, port))
        listening.listen()
        yield listening


def _tcp(family: _Family) -> socket.socket:
    made = socket.socket(family.number, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.settimeout(_SECONDS)
    return made


def _udp(family: _Family) -> socket.socket:
    made = socket.socket(family.number, socket.SOCK_DGRAM)
    made.settimeout(_SECONDS)
    return made


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind((LOOPBACK6, 0))
    except OSError:
        return False
    return True


def _lo_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise _Wrong(f"{what} is {found!r} and not {wanted!r}")


def _noted(bench: Bench, key: Note) -> int | None:
    value = Quad()
    return int(value.quad) if syscalls.map_lookup(bench.tables.notes, Word(key), value) else None


def _listener(bench: Bench, key: int) -> bool:
    return syscalls.map_lookup(bench.tables.listeners, Word(key), Quad())


def _put(bench: Bench, key: int, fd: int) -> None:
    if number := syscalls.map_update(bench.tables.listeners, Word(key), Quad(fd)):
        raise syscalls.refused("bpf_map_update_elem", "sockhash", number)
