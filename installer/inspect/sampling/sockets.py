"""The TCP sockets of the calling thread's namespace, from the kernel's sock_diag(7).

pyroute2's DiagSocket brings an event loop and a decoder for every attribute; a node has tens of thousands of sockets,
and of each only the fixed header and two counters are wanted, so the messages are read with struct here.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# uapi/linux/netlink.h, sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_INFO = 2  # INET_DIAG_INFO; in requests a bit, from 1
_REQUEST = struct.Struct("=IHHII BBBxI48x")  # nlmsghdr, inet_diag_req_v2 with an empty sockid
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBB 2s2s 16s16s I8s IIIII")  # inet_diag_msg
_ATTRIBUTE = struct.Struct("=HH")
# uapi/linux/tcp.h, struct tcp_info: tcpi_bytes_acked, tcpi_bytes_received (Linux 4.1)
_BYTES = struct.Struct("=QQ")
_BYTES_OFFSET = 120
# as large as the kernel makes a datagram of a dump (NLMSG_GOODSIZE to 32 KiB)
_BUFFER = 1 << 16
_MAPPED = bytes(10) + b"\xff\xff"

# net/tcp_states.h
ESTABLISHED, TIME_WAIT, LISTEN = 1, 6, 10


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """One socket. Addresses are 16 bytes in network order, IPv4 mapped, as everywhere in the maps."""

    state: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    uid: int  # as the initial user namespace has it; 0 in TIME_WAIT, which belongs to nobody
    transferred: int  # bytes sent and acknowledged, and bytes received


def tcp_sockets(*states: int) -> Iterator[TcpSocket]:
    """Every socket in one of these states, of both families. Raises OSError, ENOENT in a kernel without tcp_diag."""
    mask = sum(1 << state for state in states)
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
            request = (family, socket.IPPROTO_TCP, 1 << (_INFO - 1), mask)
            diag.send(_REQUEST.pack(_REQUEST.size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0, *request))
            try:
                yield from _replies(diag)
            except FileNotFoundError:
                if family == socket.AF_INET:  # else only a kernel without IPv6
                    raise


def _replies(diag: socket.socket) -> Iterator[TcpSocket]:
    while True:
        datagram = diag.recv(_BUFFER)
        if not datagram:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset = 0
        while offset < len(datagram):
            length, kind, *_ = _HEADER.unpack_from(datagram, offset)
            if kind == _DONE:
                return
            if kind == _ERROR:
                (number,) = struct.unpack_from("=i", datagram, offset + _HEADER.size)
                raise OSError(-number, os.strerror(-number))
            yield _parse(datagram, offset + _HEADER.size, offset + length)
            offset += (length + 3) & ~3


def _parse(datagram: bytes, start: int, end: int) -> TcpSocket:
    family, state, _, _, local_port, remote_port, local, remote, _, _, _, _, _, uid, _ = _MESSAGE.unpack_from(
        datagram, start
    )
    if family == socket.AF_INET:
        local, remote = _MAPPED + local[:4], _MAPPED + remote[:4]
    return TcpSocket(
        state,
        local,
        int.from_bytes(local_port, "big"),
        remote,
        int.from_bytes(remote_port, "big"),
        uid,
        _transferred(datagram, start + _MESSAGE.size, end),
    )


def _transferred(datagram: bytes, start: int, end: int) -> int:
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(datagram, start)
        if length < _ATTRIBUTE.size:
            break
        if kind == _INFO and length >= _ATTRIBUTE.size + _BYTES_OFFSET + _BYTES.size:
            return sum(_BYTES.unpack_from(datagram, start + _ATTRIBUTE.size + _BYTES_OFFSET))
        start += (length + 3) & ~3
    return 0
