"""The TCP connections of a network namespace, to list and to end: sock_diag(7) over a plain socket, as in rtnl.py."""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

# uapi/linux/netlink.h, sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ASKED = struct.Struct("=BBBxI")  # family, protocol, extensions, states; a socket's id follows
_ID = struct.Struct("!HH16s16s")  # ports and addresses in network order; interface and cookie follow as they came
_ID_BYTES = 48
_TOLD = struct.Struct("=BBBB")  # family, state, …; a socket's id follows, then five numbers, the last of them the inode
_NUMBERS = struct.Struct("=5I")
# TCP_LISTEN and TCP_TIME_WAIT, TCP_NEW_SYN_RECV (net/tcp_states.h) are nobody's connections
_STATES = 0xFFF & ~(1 << 10 | 1 << 6 | 1 << 12)
LISTEN = 10
_BUFFER = 1 << 18


@dataclass(frozen=True)
class Connection:
    """One end of a connection; ports in host order. `raw` is its id as the kernel wants it back."""

    family: int
    local: IPv4Address | IPv6Address
    local_port: int
    remote: IPv4Address | IPv6Address
    remote_port: int
    inode: int
    raw: bytes


class Diag:
    """One conversation about the namespace that the calling thread is in. Raises OSError."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self._socket.settimeout(5)

    def __enter__(self) -> "Diag":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def connections(self) -> Iterator[Connection]:
        """All of TCP, mapped addresses as IPv4."""
        return self._dump(_STATES)

    def sockets(self, *states: int) -> Iterator[Connection]:
        """Every one in one of these states, of both families."""
        return self._dump(sum(1 << state for state in states))

    def _dump(self, states: int) -> Iterator[Connection]:
        for family in (socket.AF_INET, socket.AF_INET6):
            self._send(_BY_FAMILY, _DUMP, family, states, bytes(_ID_BYTES))
            for body in self._answers():
                yield _connection(body)

    def destroy(self, connection: Connection) -> bool:
        """End it: both sides get a reset. False when it is gone. Takes CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY."""
        self._send(_DESTROY, _ACK, connection.family, _STATES, connection.raw)
        try:
            for _ in self._answers():
                pass
        except FileNotFoundError:
            return False
        return True

    def _send(self, kind: int, flags: int, family: int, states: int, raw: bytes) -> None:
        body = _ASKED.pack(family, socket.IPPROTO_TCP, 0, states) + raw
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)

    def _answers(self) -> Iterator[bytes]:
        while True:
            data = self._socket.recv(_BUFFER)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                yield body


def _connection(body: bytes) -> Connection:
    family = _TOLD.unpack_from(body)[0]
    raw = body[_TOLD.size : _TOLD.size + _ID_BYTES]
    local_port, remote_port, local, remote = _ID.unpack_from(raw)
    inode = _NUMBERS.unpack_from(body, _TOLD.size + _ID_BYTES)[4]
    return Connection(family, _ip(family, local), local_port, _ip(family, remote), remote_port, inode, raw)


def _ip(family: int, raw: bytes) -> IPv4Address | IPv6Address:
    if family == socket.AF_INET:
        return IPv4Address(raw[:4])
    address = IPv6Address(raw)
    return address.ipv4_mapped or address
