"""Asks conntrack of the calling thread's network namespace what became of a connection.

One question and answer over netlink for each connection (ctnetlink, uapi/linux/netfilter/nfnetlink_conntrack.h). A
mesh pod may make hundreds of connections a second, and pyroute2 would take a millisecond to decode each.
"""

import errno
import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import TracebackType
from typing import NamedTuple

from cni.netns.dumps import attributes

IpAddress = IPv4Address | IPv6Address

_NETLINK_NETFILTER = 12  # uapi/linux/netlink.h
_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_REQUEST, _NLMSG_ERROR = 1, 2  # NLM_F_REQUEST; the answer that is an errno
_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr and nfgenmsg
_NLMSGHDR = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")  # length with these four bytes, type
_NESTED = 0x8000  # NLA_F_NESTED
# enum ctattr_type, ctattr_tuple, ctattr_ip, ctattr_l4proto
_TUPLE_ORIG, _TUPLE_REPLY, _ZONE = 1, 2, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST, _V6_SRC, _V6_DST = 1, 2, 3, 4
_PROTO_NUM, _SRC_PORT, _DST_PORT = 1, 2, 3
_ROOM = 1 << 14  # bytes; an entry takes some hundred
_SECONDS = 2.0


class Ends(NamedTuple):
    """Source and destination of packets, as conntrack has them; ports in host order."""

    source: IpAddress
    source_port: int
    destination: IpAddress
    destination_port: int


class Tracked(NamedTuple):
    """An entry: the first packet's ends before any NAT, and those that replies have."""

    original: Ends
    reply: Ends

    @property
    def is_redirected(self) -> bool:
        """Whether the destination was changed."""
        return (self.reply.source, self.reply.source_port) != (
            self.original.destination,
            self.original.destination_port,
        )


class Conntrack:
    """A conversation with the namespace that the calling thread is in. Raises OSError if there is no conntrack."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.settimeout(_SECONDS)
        self._sequence = 0

    def find(self, protocol: int, ends: Ends, zones: tuple[int, ...] = (0,)) -> Tracked | None:
        """The entry whose packets have these ends, in either direction; None if there is none in these zones.

        `protocol` is IPPROTO_TCP or IPPROTO_UDP. Raises OSError.
        """
        for zone in zones:
            if found := self._ask(protocol, ends, zone):
                return found
        return None

    def _ask(self, protocol: int, ends: Ends, zone: int) -> Tracked | None:
        self._sequence += 1
        body = _tuple(protocol, ends) + (_attribute(_ZONE, struct.pack("!H", zone)) if zone else b"")
        family = socket.AF_INET if ends.source.version == 4 else socket.AF_INET6
        size = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(size, _GET, _REQUEST, self._sequence, 0, family, 0, 0) + body)
        while True:
            answer = self._socket.recv(_ROOM)
            _, kind, _, sequence, _ = _NLMSGHDR.unpack_from(answer)
            if sequence != self._sequence:  # the answer to a question that was given up
                continue
            if kind != _NLMSG_ERROR:
                return _tracked(answer[_HEADER.size :])
            number = -struct.unpack_from("=i", answer, _NLMSGHDR.size)[0]
            if number == errno.ENOENT:
                return None
            raise OSError(number, os.strerror(number))

    def __enter__(self) -> "Conntrack":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()


def _attribute(kind: int, payload: bytes) -> bytes:
    padding = -len(payload) % 4
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(padding)


def _tuple(protocol: int, ends: Ends) -> bytes:
    source, destination = (_V4_SRC, _V4_DST) if ends.source.version == 4 else (_V6_SRC, _V6_DST)
    addresses = _attribute(source, ends.source.packed) + _attribute(destination, ends.destination.packed)
    ports = _attribute(_PROTO_NUM, bytes([protocol]))
    ports += _attribute(_SRC_PORT, struct.pack("!H", ends.source_port))
    ports += _attribute(_DST_PORT, struct.pack("!H", ends.destination_port))
    both = _attribute(_TUPLE_IP | _NESTED, addresses) + _attribute(_TUPLE_PROTO | _NESTED, ports)
    return _attribute(_TUPLE_ORIG | _NESTED, both)


def _tracked(message: bytes) -> Tracked:
    told = attributes(message, 0)
    return Tracked(_ends(told[_TUPLE_ORIG]), _ends(told[_TUPLE_REPLY]))


def _ends(data: bytes) -> Ends:
    told = attributes(data, 0)
    addresses, ports = attributes(told[_TUPLE_IP], 0), attributes(told[_TUPLE_PROTO], 0)
    source = ip_address(addresses.get(_V4_SRC) or addresses[_V6_SRC])
    destination = ip_address(addresses.get(_V4_DST) or addresses[_V6_DST])
    first, second = (int.from_bytes(ports[kind], "big") for kind in (_SRC_PORT, _DST_PORT))
    return Ends(source, first, destination, second)
