"""An rtnetlink conversation in the calling thread's namespace: pyroute2's messages and parser over a plain socket.

pyroute2's own IPRoute does not fit, for three reasons. It gives each thread its own socket, but Watch's socket has to
stay in the namespace made for it. It numbers the requests itself, but Watch recognises sidestep's own changes by our
number. And it runs an event loop for each socket: the conversation of an ADD takes 1.6 ms with IPRoute and 0.7 ms here
(IPRoute takes 0.17 ms to open, and 0.1 ms more for each request).
"""

import errno
import os
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple

from pyroute2 import netlink
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.netns.dumps import BUFFER, SEQUENCE, Dump, attribute, attributes, dump, is_done, refusal
from cni.netns.routes import RTMSG, IpNetwork

IpAddress = IPv4Address | IPv6Address

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

# uapi/linux/rtnetlink.h and fib_rules.h
LOCAL_TABLE = 255
_RTN_LOCAL, _RTN_UNREACHABLE = 2, 7
_RT_SCOPE_HOST, _RTPROT_STATIC = 254, 4
_FR_ACT_TO_TBL = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFLA_IFNAME = 1, 2, 3  # uapi/linux/if_addr.h, if_link.h
_RTA_DST, _RTA_SRC = 1, 2
_IFADDRMSG, _IFINFOMSG = struct.Struct("=4BI"), struct.Struct("=BxHiII")
_MOST_LINKS = 1 << 16
_DUMP_TRIES = 10
_SO_RCVBUFFORCE = 33  # uapi/asm-generic/socket.h; may exceed net.core.rmem_max
# NETNSA_NSID_NOT_ASSIGNED (uapi/linux/net_namespace.h) is -1; pyroute2 reads the field as unsigned
_NOT_ASSIGNED = 0xFFFFFFFF


@dataclass(frozen=True)
class SubnetAddress:
    """An address of an interface, with its subnet."""

    ip: IpAddress
    ifindex: int
    subnet: IpNetwork


class Addresses(NamedTuple):
    """Addresses of a namespace; `is_whole` if there are no more."""

    found: list[SubnetAddress]
    is_whole: bool


class _Request(NamedTuple):
    """A message to the kernel: its class of pyroute2, and what it says."""

    message: type[Any]
    attributes: tuple[tuple[str, str | int], ...]
    fields: tuple[tuple[str, int], ...]


class Rtnl:
    """A conversation with the network namespace of the thread that makes it; a context manager.

    Any thread may use it, one at a time.
    """

    def __init__(self) -> None:
        self._socket = _open()
        self._parser = MarshalRtnl()

    def __enter__(self) -> "Rtnl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def addresses(self, limit: int) -> "Addresses":
        """The addresses in the kernel's order, IPv4 first; of more than `limit`, the first half of each family."""
        head = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        found = self._dump(rtnl.RTM_GETADDR, head, limit)
        messages = found.messages
        if len(messages) == limit:
            heads = (_IFADDRMSG.pack(family, 0, 0, 0, 0) for family in _FAMILIES.values())
            messages = [each for one in heads for each in self._dump(rtnl.RTM_GETADDR, one, limit // 2).messages]
        return Addresses([_address(message) for message in messages], len(found.messages) < limit)

    def add_address(self, ip: IpAddress, ifindex: int) -> None:
        """Put a host address on an interface. Raises OSError; FileExistsError if the address is there already."""
        told = {"IFA_LOCAL": str(ip), "IFA_ADDRESS": str(ip)}
        message = _filled(ifaddrmsg, told, family=_FAMILIES[ip.version], prefixlen=ip.max_prefixlen, index=ifindex)
        self._do(message, rtnl.RTM_NEWADDR, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)

    def links(self) -> Iterator[tuple[str, int]]:
        """Every interface by name, with its index."""
        for message in self._dump(rtnl.RTM_GETLINK, bytes(_IFINFOMSG.size), _MOST_LINKS).messages:
            name = attributes(message, _IFINFOMSG.size)[_IFLA_IFNAME]
            yield name.rstrip(b"\0").decode(errors="replace"), _IFINFOMSG.unpack_from(message)[2]

    def routes(self, limit: int) -> Dump:
        """All routes of both families: messages of struct rtmsg, at most `limit`."""
        return self._dump(rtnl.RTM_GETROUTE, bytes(RTMSG.size), limit)

    def rules(self, limit: int) -> Dump:
        """All routing rules of both families: messages of struct fib_rule_hdr, at most `limit`."""
        return self._dump(rtnl.RTM_GETRULE, bytes(RTMSG.size), limit)

    def refuses(self, destination: IpAddress, source: IpAddress) -> bool:
        """Whether the kernel refuses to send from a source address to a destination (EINVAL)."""
        bits, family = destination.max_prefixlen, _FAMILIES[destination.version]
        head = RTMSG.pack(family, bits, bits, 0, 0, 0, 0, 0, 0)
        told = attribute(_RTA_DST, destination.packed) + attribute(_RTA_SRC, source.packed)
        return refusal(self._socket, rtnl.RTM_GETROUTE, head + told) == errno.EINVAL

    def source_to(self, destination: IpAddress) -> IpAddress | None:
        """The source address that the kernel would choose for a destination; None if it has no route there."""
        return _source_of(self._route_to(destination))

    def local_source_to(self, destination: IpAddress) -> tuple[bool, IpAddress | None]:
        """Whether a destination is delivered to this namespace itself; and as source_to()."""
        route = self._route_to(destination)
        return bool(route and route["type"] == _RTN_LOCAL), _source_of(route)

    def _route_to(self, destination: IpAddress) -> Any:
        told = {"RTA_DST": str(destination)}
        request = _filled(rtmsg, told, family=_FAMILIES[destination.version], dst_len=destination.max_prefixlen)
        with suppress(OSError):
            return next(iter(list(self._ask(request, rtnl.RTM_GETROUTE, netlink.NLM_F_ACK))), None)
        return None

    def make_local(self, network: IpNetwork, ifindex: int, table: int, source: IpAddress | None) -> None:
        """Have packets for `network` delivered to this namespace. Replaces an earlier route for it in `table`.

        `source` is the preferred source address of packets to `network`. Raises OSError; EINVAL if `source` is not, or
        not yet, a usable address here.
        """
        told: dict[str, str | int] = {"RTA_TABLE": table, "RTA_OIF": ifindex}
        if network.prefixlen:
            told["RTA_DST"] = str(network.network_address)
        if source is not None:
            told["RTA_PREFSRC"] = str(source)
        where = {"family": _FAMILIES[network.version], "dst_len": network.prefixlen, "table": table}
        message = _filled(rtmsg, told, **where, type=_RTN_LOCAL, scope=_RT_SCOPE_HOST, proto=_RTPROT_STATIC)
        self._do(message, rtnl.RTM_NEWROUTE, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)

    def make_unreachable(self, network: IpNetwork, table: int) -> None:
        """Have the kernel refuse to send to `network` (EHOSTUNREACH). Raises OSError."""
        told: dict[str, str | int] = {"RTA_TABLE": table, "RTA_DST": str(network.network_address)}
        where = {"family": _FAMILIES[network.version], "dst_len": network.prefixlen, "table": table}
        message = _filled(rtmsg, told, **where, type=_RTN_UNREACHABLE, proto=_RTPROT_STATIC)
        self._do(message, rtnl.RTM_NEWROUTE, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)

    def route_mark(self, version: int, mark: int, table: int, mask: int = 0, priority: int = 0) -> None:
        """Have packets with a firewall mark routed by `table`. Raises OSError; FileExistsError if the rule exists.

        `mask` says which bits of the mark count, 0 for all. If `priority` is 0, the kernel chooses one.
        """
        told = {"FRA_FWMARK": mark, "FRA_TABLE": table}
        if mask:
            told["FRA_FWMASK"] = mask
        if priority:
            told["FRA_PRIORITY"] = priority
        message = _filled(fibmsg, told, family=_FAMILIES[version], table=table, action=_FR_ACT_TO_TBL)
        self._do(message, rtnl.RTM_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)

    def number(self, netns_fd: int, nsid: int) -> int:
        """Give another namespace the number `nsid` in this one, unless it has a number. Returns the number it has now.

        The namespace keeps its number as long as it exists; the number does not keep the namespace alive. RTM_NEWNSID,
        Linux 4.0. Raises OSError; FileExistsError if another namespace has the number.
        """
        try:
            self._do(_filled(nsidmsg, {"NETNSA_FD": netns_fd, "NETNSA_NSID": nsid}), rtnl.RTM_NEWNSID, 0)
        except FileExistsError:
            (known,) = self._ask(_filled(nsidmsg, {"NETNSA_FD": netns_fd}), rtnl.RTM_GETNSID, netlink.NLM_F_ACK)
            nsid = known.get_attr("NETNSA_NSID")
            if nsid == _NOT_ASSIGNED:
                raise
        return nsid

    def is_number_alive(self, nsid: int) -> bool:
        """Whether a namespace with this number exists. RTM_GETNSID by number, Linux 5.0. Raises OSError."""
        try:
            self._do(_filled(nsidmsg, {"NETNSA_NSID": nsid}), rtnl.RTM_GETNSID, 0)
        except FileNotFoundError:
            return False
        return True

    def _do(self, request: _Request, kind: int, flags: int) -> None:
        for _ in self._ask(request, kind, netlink.NLM_F_ACK | flags):
            pass

    def _dump(self, kind: int, head: bytes, limit: int) -> Dump:
        """The objects of a kind, at most `limit`.

        If the kernel says that something changed during the dump, ask for all of it again.
        """
        for _ in range(_DUMP_TRIES):
            found, is_free = dump(self._socket, kind, head, limit)
            if not is_free:
                self._start_anew()
            if found.is_whole or not is_free:
                break
        return found

    def _start_anew(self) -> None:
        """Let go of the rest of an answer, which nobody reads. It goes with its socket."""
        self._socket.close()
        self._socket = _open()

    def _ask(self, request: _Request, kind: int, flags: int) -> Iterator[Any]:
        """Send one request and yield the replies up to the end or the acknowledgement. Raises OSError."""
        self._socket.send(_encoded(request, kind, flags))
        while True:
            answer = self._socket.recv(BUFFER)
            if is_done(answer):
                return
            for reply in self._parser.parse(answer):
                if reply["header"]["type"] == netlink.NLMSG_ERROR:
                    if error := reply["header"]["error"]:
                        raise OSError(error.code, os.strerror(error.code))
                    return
                if reply["header"]["type"] == netlink.NLMSG_DONE:
                    return
                yield reply


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def _address(message: bytes) -> SubnetAddress:
    """A message of RTM_GETADDR: struct ifaddrmsg is family, prefixlen, flags, scope, index."""
    _, length, _, _, ifindex = _IFADDRMSG.unpack_from(message)
    told = attributes(message, _IFADDRMSG.size)
    ip = ip_address(told.get(_IFA_LOCAL) or told[_IFA_ADDRESS])
    return SubnetAddress(ip, ifindex, ip_network((ip.packed, length), strict=False))


def _source_of(route: Any) -> IpAddress | None:
    source = route.get_attr("RTA_PREFSRC") if route else None
    return ip_address(source) if source else None


def listen(groups: Iterable[int], room: int, everywhere: bool) -> socket.socket:
    """A non-blocking socket that hears multicast groups of the calling thread's namespace.

    If `everywhere`, it also hears all namespaces that have a number there. `room` is the size in bytes of its buffer
    for unread messages. Needs CAP_NET_ADMIN for the buffer; `everywhere` also needs Linux 4.2, and CAP_NET_BROADCAST in
    the user namespace of each network namespace to hear. Raises OSError.
    """
    listening = _open()
    with ExitStack() as undo:
        undo.callback(listening.close)
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room)
        if everywhere:
            listening.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_LISTEN_ALL_NSID, 1)
        # If somebody makes a change with NLM_F_ECHO, the kernel does not tell sockets that have the same netlink port,
        # in whatever namespace (do_one_broadcast in af_netlink.c). Ports are usually process ids, so take a port that
        # cannot be a process id.
        listening.bind((1 << 31 | secrets.randbits(31), 0))
        for group in groups:
            listening.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_ADD_MEMBERSHIP, group)
        undo.pop_all()
    return listening


def _filled(kind: type[Any], attributes: Mapping[str, str | int], **fields: int) -> _Request:
    return _Request(kind, tuple(attributes.items()), tuple(fields.items()))


@lru_cache(maxsize=64)
def _encoded(request: _Request, kind: int, flags: int) -> bytes:
    """The bytes of a request. pyroute2 takes 50 µs to make them, and most requests of an ADD are those of the last."""
    message = request.message()
    for name, value in request.fields:
        message[name] = value
    message["attrs"] = list(request.attributes)
    message["header"].update(type=kind, flags=netlink.NLM_F_REQUEST | flags, sequence_number=SEQUENCE)
    message.encode()
    return bytes(message.data)
