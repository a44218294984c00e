"""One small program for every hook of ours, with everything that the real one asks of the kernel there.

The programs do in miniature what the real ones do, with fixed addresses, so that exercise.py can see them act inside a
network namespace of its own: 127.0.0.2 (::2) stands for a destination that is captured, 127.0.0.1 (::1) is where the
proxy's stand-in listens. A program is made of parts, one for each helper or field; when the kernel refuses the whole,
the parts are tried one by one to name the one that is missing.
"""

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

from bpf.hooks import HOOKS, Hook
from bpf.probing.instructions import (
    HALF,
    QUAD,
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R8,
    R10,
    WORD,
    add,
    call,
    give,
    load,
    map_pointer,
    move,
    put,
    store,
    store_number,
    unless,
    unless_beyond,
    when,
)

OUTBOUND, INBOUND, RESOLVER = 15001, 15006, 15053  # where the proxy's stand-in listens
ASKED, NAMESERVER, STEERED = 7, 53, 81  # ports that the application's stand-in asks for
ASKED4, SOURCE4, STEERED4, LOOPBACK4 = "127.0.0.2", "127.0.0.9", "127.0.0.3", "127.0.0.1"
ASKED6, LOOPBACK6 = "::2", "::1"
MARK = 0x53495354  # what sock_create leaves with a socket
BY_PROGRAM, BY_USER = 1, 2  # keys of the listeners table: who put the listener there
ORIGINAL_DST = 80  # SO_ORIGINAL_DST

# helper numbers: ___BPF_FUNC_MAPPER of uapi/linux/bpf.h
_MAP_LOOKUP, _MAP_UPDATE, _UID_GID, _SET_CALLBACKS, _BIND, _SOCK_HASH_UPDATE = 1, 2, 15, 59, 64, 70
_CGROUP_ID, _SK_RELEASE, _STORAGE_GET, _NETNS_COOKIE, _SK_ASSIGN = 80, 86, 107, 122, 124
_FIND, _CREATE = 0, 1  # flags of sk_storage_get: BPF_SK_STORAGE_GET_F_CREATE
_LISTEN, _ACTIVE, _PASSIVE = 11, 4, 5  # BPF_SOCK_OPS_TCP_LISTEN_CB, …ACTIVE_ESTABLISHED_CB, …PASSIVE_ESTABLISHED_CB
_STATE_CALLBACKS = 4  # BPF_SOCK_OPS_STATE_CB_FLAG

# offsets of context fields (uapi/linux/bpf.h)
_ADDR_IP4, _ADDR_IP6, _ADDR_PORT, _ADDR_SOURCE4, _ADDR_SOURCE6, _ADDR_SK = 4, 8, 24, 40, 44, 64  # struct bpf_sock_addr
_OPS_OP, _OPS_LOCAL_PORT, _OPS_SK = 0, 68, 184  # struct bpf_sock_ops
_OPT_SK, _OPT_VALUE, _OPT_END, _OPT_NAME, _OPT_LENGTH, _OPT_RESULT = 0, 8, 16, 28, 32, 36  # struct bpf_sockopt
_LOOKUP_LOCAL_PORT, _LOOKUP_INTERFACE = 60, 64  # struct bpf_sk_lookup
_SOCK_PORT = 44  # struct bpf_sock


class Note(IntEnum):
    """Keys of the notes table: what the programs have seen."""

    COOKIE_SOCK = 1
    COOKIE_ADDR = 2
    COOKIE_OPS = 3
    COOKIE_SOCKOPT = 4
    CGROUP = 5
    CALLER = 6
    STORED = 7
    BOUND = 8
    ASSIGNED = 9
    INTERFACE = 10
    REGISTERED = 11
    CALLBACKS = 12
    ACCEPTED = 13


@dataclass(frozen=True)
class TrialTables:
    """Descriptors of the tables the programs share; notes: Note → u64, storage: u32, listeners: u32 → socket."""

    notes: int
    storage: int
    listeners: int


# helper or field → the instructions that use it; r6 is the context, the rest is anybody's
Parts = Mapping[str, bytes]


@dataclass(frozen=True)
class Trial:
    """A hook and the miniature of its program."""

    hook: Hook
    parts: Parts

    def program(self) -> bytes:
        """The whole."""
        return _framed(b"".join(self.parts.values()))

    def alone(self) -> Iterator[tuple[str, bytes]]:
        """Each part as a program of its own, by name."""
        return ((name, _framed(part)) for name, part in self.parts.items())


def trials(tables: TrialTables) -> list[Trial]:
    """A trial for each of HOOKS, in their order."""
    return [Trial(hook, _parts(hook.name, tables)) for hook in HOOKS]


def idle() -> bytes:
    """A program that lets everything pass."""
    return give(1)


def _parts(name: str, tables: TrialTables) -> Parts:
    if name == "sock_create":
        return _sock_create(tables)
    if name.startswith("post_bind"):
        return _post_bind(tables)
    if name == "sockops":
        return _sockops(tables)
    if name == "getsockopt":
        return _getsockopt(tables)
    if name == "sk_lookup":
        return _sk_lookup(tables)
    call_name, family = name[:-1], _IP4 if name.endswith("4") else _IP6
    of_call = {"connect": _connect, "getpeername": _getpeername, "sendmsg": _sendmsg, "recvmsg": _recvmsg}
    return of_call[call_name](tables, family)


@dataclass(frozen=True)
class _Family:
    """Where struct bpf_sock_addr has an address of this family, and the stand-ins' addresses as its words."""

    at: int
    source_at: int
    asked: tuple[int, ...]
    loopback: tuple[int, ...]
    source: tuple[int, ...]  # what captured connections and queries are sent from
    bind: bytes  # a sockaddr of the source with port 0


def _words(address: bytes) -> tuple[int, ...]:
    """Network-order bytes as this machine reads them; none here is beyond the signed range of an instruction."""
    return tuple(int.from_bytes(address[at : at + 4], "little") for at in range(0, len(address), 4))


def _inet(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


_IP4 = _Family(
    _ADDR_IP4,
    _ADDR_SOURCE4,
    _words(_inet(ASKED4)),
    _words(_inet(LOOPBACK4)),
    _words(_inet(SOURCE4)),
    socket.AF_INET.to_bytes(4, "little") + _inet(SOURCE4) + bytes(8),
)
_IP6 = _Family(
    _ADDR_IP6,
    _ADDR_SOURCE6,
    _words(_inet(ASKED6)),
    _words(_inet(LOOPBACK6)),
    _words(_inet(LOOPBACK6)),
    socket.AF_INET6.to_bytes(4, "little") + bytes(4) + _inet(LOOPBACK6) + bytes(4),
)


def _framed(body: bytes) -> bytes:
    return move(R6, R1) + body + give(1)


def _field(offset: int, number: int, body: bytes) -> bytes:
    """Run `body` only if a 32-bit field of the context has this value."""
    return load(WORD, R1, R6, offset) + when(R1, number, body)


def _write(offset: int, *words: int) -> bytes:
    """Write words into consecutive fields of the context."""
    written = (put(R1, word) + store(WORD, R6, offset + 4 * at, R1) for at, word in enumerate(words))
    return b"".join(written)


def _note(key: Note, tables: TrialTables) -> bytes:
    """Keep r0 in the notes."""
    arguments = map_pointer(R1, tables.notes) + move(R2, R10) + add(R2, -4) + move(R3, R10) + add(R3, -16) + put(R4, 0)
    return store(QUAD, R10, -16, R0) + store_number(WORD, R10, -4, key) + arguments + call(_MAP_UPDATE)


def _cookie(key: Note, tables: TrialTables) -> bytes:
    return move(R1, R6) + call(_NETNS_COOKIE) + _note(key, tables)


def _storage(tables: TrialTables, socket_at: int, flag: int) -> bytes:
    """The storage of the socket in a field of the context, in r0."""
    return (
        map_pointer(R1, tables.storage)
        + load(QUAD, R2, R6, socket_at)
        + put(R3, 0)
        + put(R4, flag)
        + call(_STORAGE_GET)
    )


def _own_storage(tables: TrialTables) -> bytes:
    """The same where the context is the socket."""
    return map_pointer(R1, tables.storage) + move(R2, R6) + put(R3, 0) + put(R4, _CREATE) + call(_STORAGE_GET)


def _caller(tables: TrialTables) -> Parts:
    return {
        "bpf_get_current_uid_gid": call(_UID_GID) + _note(Note.CALLER, tables),
        "bpf_get_current_cgroup_id": call(_CGROUP_ID) + _note(Note.CGROUP, tables),
    }


def _sock_create(tables: TrialTables) -> Parts:
    return {
        "bpf_get_netns_cookie": _cookie(Note.COOKIE_SOCK, tables),
        "bpf_sk_storage_get": _own_storage(tables) + unless(R0, 0, store_number(WORD, R0, 0, MARK)),
        **_caller(tables),
    }


def _post_bind(tables: TrialTables) -> Parts:
    bound = put(R0, 1) + _note(Note.BOUND, tables)
    parts = {
        "bpf_get_netns_cookie": _cookie(Note.COOKIE_SOCK, tables),
        "bpf_sk_storage_get": _own_storage(tables) + unless(R0, 0, bound),
        **_caller(tables),
    }
    return {name: _field(_SOCK_PORT, INBOUND, part) for name, part in parts.items()}


def _when_asked(family: _Family, parts: Parts) -> Parts:
    """Only for what the application's stand-in asks for. A part that rewrites the address has to be the last."""
    last = family.at + 4 * (len(family.asked) - 1)
    return {name: _field(last, family.asked[-1], part) for name, part in parts.items()}


def _connect(tables: TrialTables, family: _Family) -> Parts:
    stored = load(WORD, R0, R0, 0) + _note(Note.STORED, tables)
    sockaddr = b"".join(store_number(WORD, R10, -48 + 4 * at, word) for at, word in enumerate(_words(family.bind)))
    bind = move(R1, R6) + move(R2, R10) + add(R2, -48) + put(R3, len(family.bind)) + call(_BIND)
    return _when_asked(
        family,
        {
            "bpf_get_netns_cookie": _cookie(Note.COOKIE_ADDR, tables),
            "bpf_sk_storage_get": _storage(tables, _ADDR_SK, _FIND) + unless(R0, 0, stored),
            "bpf_bind": sockaddr + bind,
            "rewriting": _write(_ADDR_PORT, socket.htons(OUTBOUND)) + _write(family.at, *family.loopback),
        },
    )


def _getpeername(tables: TrialTables, family: _Family) -> Parts:
    parts = {
        "bpf_get_netns_cookie": _cookie(Note.COOKIE_ADDR, tables),
        "bpf_sk_storage_get": _storage(tables, _ADDR_SK, _FIND),
        "rewriting": _write(family.at, *family.asked) + _write(_ADDR_PORT, socket.htons(ASKED)),
    }
    return {name: _field(_ADDR_PORT, socket.htons(OUTBOUND), part) for name, part in parts.items()}


def _sendmsg(tables: TrialTables, family: _Family) -> Parts:
    return _when_asked(
        family,
        {
            "bpf_get_netns_cookie": _cookie(Note.COOKIE_ADDR, tables),
            "bpf_sk_storage_get": _storage(tables, _ADDR_SK, _CREATE),
            "choosing the source": _write(family.source_at, *family.source),
            "rewriting": _write(_ADDR_PORT, socket.htons(RESOLVER)) + _write(family.at, *family.loopback),
        },
    )


def _recvmsg(tables: TrialTables, family: _Family) -> Parts:
    parts = {
        "bpf_sk_storage_get": _storage(tables, _ADDR_SK, _FIND),
        "rewriting": _write(family.at, *family.asked) + _write(_ADDR_PORT, socket.htons(NAMESERVER)),
    }
    return {name: _field(_ADDR_PORT, socket.htons(RESOLVER), part) for name, part in parts.items()}


def _sockops(tables: TrialTables) -> Parts:
    key = store_number(WORD, R10, -4, BY_PROGRAM) + map_pointer(R2, tables.listeners) + move(R3, R10) + add(R3, -4)
    register = key + move(R1, R6) + put(R4, 0) + call(_SOCK_HASH_UPDATE) + _note(Note.REGISTERED, tables)
    accepted = put(R0, 1) + _note(Note.ACCEPTED, tables)
    get = map_pointer(R1, tables.storage) + put(R3, 0) + put(R4, _CREATE) + call(_STORAGE_GET)
    keep = load(QUAD, R2, R6, _OPS_SK) + unless(R2, 0, get + unless(R0, 0, accepted))
    callbacks = move(R1, R6) + put(R2, _STATE_CALLBACKS) + call(_SET_CALLBACKS) + _note(Note.CALLBACKS, tables)
    return {
        "bpf_get_netns_cookie": _field(_OPS_OP, _ACTIVE, _cookie(Note.COOKIE_OPS, tables)),
        "bpf_sk_storage_get": _field(_OPS_OP, _PASSIVE, keep),
        "bpf_sock_hash_update": _field(_OPS_OP, _LISTEN, _field(_OPS_LOCAL_PORT, INBOUND, register)),
        "bpf_sock_ops_cb_flags_set": _field(_OPS_OP, _ACTIVE, callbacks),
    }


def _getsockopt(tables: TrialTables) -> Parts:
    fields = (
        store_number(HALF, R7, 0, socket.AF_INET)
        + store_number(HALF, R7, 2, socket.htons(ASKED))
        + store_number(WORD, R7, 4, _IP4.asked[0])
        + store_number(QUAD, R7, 8, 0)
    )
    room = load(QUAD, R7, R6, _OPT_VALUE) + load(QUAD, R8, R6, _OPT_END) + move(R1, R7) + add(R1, 16)
    parts = {
        "bpf_get_netns_cookie": _cookie(Note.COOKIE_SOCKOPT, tables),
        "bpf_sk_storage_get": _storage(tables, _OPT_SK, _FIND),
        "answering": room + unless_beyond(R1, R8, fields + _write(_OPT_LENGTH, 16) + _write(_OPT_RESULT, 0)),
    }
    return {name: _field(_OPT_NAME, ORIGINAL_DST, part) for name, part in parts.items()}


def _sk_lookup(tables: TrialTables) -> Parts:
    key = store_number(WORD, R10, -4, BY_PROGRAM) + move(R2, R10) + add(R2, -4)
    assign = move(R1, R6) + move(R2, R7) + put(R3, 0) + call(_SK_ASSIGN)
    given = move(R7, R0) + assign + move(R8, R0) + move(R1, R7) + call(_SK_RELEASE) + move(R0, R8)
    find = key + map_pointer(R1, tables.listeners) + call(_MAP_LOOKUP)
    parts = {
        "ingress_ifindex": load(WORD, R0, R6, _LOOKUP_INTERFACE) + _note(Note.INTERFACE, tables),
        "bpf_sk_assign": find + unless(R0, 0, given + _note(Note.ASSIGNED, tables)),
    }
    return {name: _field(_LOOKUP_LOCAL_PORT, STEERED, part) for name, part in parts.items()}
