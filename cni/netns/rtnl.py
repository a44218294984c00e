"""One rtnetlink conversation in the calling thread's namespace: pyroute2's messages over a plain socket.

pyroute2's IPRoute brings an event loop to every socket it opens, which is most of what an ADD would cost; its message
classes and parser are all that a dump and an address need.
"""

import errno
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from pyroute2.netlink import (
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_LISTEN_ALL_NSID,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
)
from pyroute2.netlink.rtnl import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNSID,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWNSID,
    RTM_NEWROUTE,
    RTM_NEWRULE,
)
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

# uapi/linux/rtnetlink.h and fib_rules.h
MAIN_TABLE, LOCAL_TABLE = 254, 255
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_RT_SCOPE_HOST, _RTPROT_STATIC = 254, 4
_FR_ACT_TO_TBL = 1
_NLM_F_DUMP_INTR = 0x10  # uapi/linux/netlink.h
_DUMP_TRIES = 10
_SO_RCVBUFFORCE = 33  # uapi/asm-generic/socket.h; not bound by net.core.rmem_max
_NOT_ASSIGNED = 0xFFFFFFFF  # uapi/linux/net_namespace.h: NETNSA_NSID_NOT_ASSIGNED, -1 in a field pyroute2 has unsigned
# nlmsg_seq of all our requests ("side"): the kernel's events about a change have that of the request, or 0
SEQUENCE = 0x73696465
_BUFFER = 1 << 16  # the kernel fills at most 32 KiB a datagram (NLMSG_GOODSIZE and growth)


@dataclass(frozen=True)
class SubnetAddress:
    """An address of an interface, and the subnet it was given with."""

    ip: IpAddress
    ifindex: int
    subnet: IpNetwork


@dataclass(frozen=True)
class UnicastRoute:
    """A unicast route of the main table: where packets for `network` leave."""

    network: IpNetwork
    ifindex: int
    metric: int


class Rtnl:
    """A conversation with the namespace it is made in, from any thread, one at a time; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._parser = MarshalRtnl()
        self._is_interrupted = False

    def __enter__(self) -> "Rtnl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def addresses(self) -> Iterator[SubnetAddress]:
        """Every address, in the kernel's order: IPv4 first."""
        for reply in self._dump(ifaddrmsg(), RTM_GETADDR):
            ip = ip_address(reply.get_attr("IFA_LOCAL") or reply.get_attr("IFA_ADDRESS"))
            subnet = ip_network((ip.packed, reply["prefixlen"]), strict=False)
            yield SubnetAddress(ip, reply["index"], subnet)

    def add_address(self, ip: IpAddress, ifindex: int) -> None:
        """Put a host address on an interface. Raises OSError, FileExistsError when it is there already."""
        message = ifaddrmsg()
        message["family"] = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        message["prefixlen"], message["index"] = ip.max_prefixlen, ifindex
        message["attrs"] = [("IFA_LOCAL", str(ip)), ("IFA_ADDRESS", str(ip))]
        self._do(message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL)

    def links(self) -> Iterator[tuple[str, int]]:
        """Every interface by name, with its index."""
        for reply in self._dump(ifinfmsg(), RTM_GETLINK):
            yield reply.get_attr("IFLA_IFNAME"), reply["index"]

    def routes(self) -> Iterator[UnicastRoute]:
        """The main table's unicast routes of both families; of several next hops the first."""
        for reply, network in self._dump_routes(MAIN_TABLE, _RTN_UNICAST):
            hops = reply.get_attr("RTA_MULTIPATH") or ()
            ifindex = reply.get_attr("RTA_OIF") or next((hop["oif"] for hop in hops), None)
            if ifindex:
                yield UnicastRoute(network, ifindex, reply.get_attr("RTA_PRIORITY") or 0)

    def source_to(self, destination: IpAddress) -> IpAddress | None:
        """The source that the kernel would choose for a destination; None where it has no route."""
        request = rtmsg()
        request["family"] = socket.AF_INET if destination.version == 4 else socket.AF_INET6
        request["dst_len"] = destination.max_prefixlen
        request["attrs"] = [("RTA_DST", str(destination))]
        try:
            replies = list(self._ask(request, RTM_GETROUTE, NLM_F_ACK))
        except OSError:
            return None
        source = next((reply.get_attr("RTA_PREFSRC") for reply in replies), None)
        return ip_address(source) if source else None

    def local_sources(self, table: int) -> dict[IpNetwork, IpAddress | None]:
        """The prefixes that a table delivers to this namespace, with the source preferred for each."""
        return {
            network: ip_address(source) if (source := reply.get_attr("RTA_PREFSRC")) else None
            for reply, network in self._dump_routes(table, _RTN_LOCAL)
        }

    def _dump_routes(self, table: int, kind: int) -> Iterator[tuple[Any, IpNetwork]]:
        for family, everything in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            request = rtmsg()
            request["family"] = family
            try:
                replies = self._dump(request, RTM_GETROUTE)
            except OSError as error:
                if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):  # a kernel without IPv6
                    continue
                raise
            for reply in replies:
                if (reply.get_attr("RTA_TABLE") or reply["table"]) == table and reply["type"] == kind:
                    yield reply, ip_network((reply.get_attr("RTA_DST") or everything, reply["dst_len"]))

    def make_local(self, network: IpNetwork, ifindex: int, table: int, source: IpAddress | None) -> None:
        """Have packets for `network` delivered to this namespace; `source` is preferred as theirs.

        Replaces an earlier route for it. Raises OSError, with EINVAL when `source` is not a usable address here (yet).
        """
        message = rtmsg()
        message["family"] = socket.AF_INET if network.version == 4 else socket.AF_INET6
        message["dst_len"], message["table"] = network.prefixlen, table
        message["type"], message["scope"], message["proto"] = _RTN_LOCAL, _RT_SCOPE_HOST, _RTPROT_STATIC
        message["attrs"] = [("RTA_TABLE", table), ("RTA_OIF", ifindex)]
        if network.prefixlen:
            message["attrs"].append(("RTA_DST", str(network.network_address)))
        if source is not None:
            message["attrs"].append(("RTA_PREFSRC", str(source)))
        self._do(message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)

    def route_mark(self, version: int, mark: int, table: int) -> None:
        """Have packets with a firewall mark looked up in a table of their own. Raises FileExistsError on the second."""
        message = fibmsg()
        message["family"] = socket.AF_INET if version == 4 else socket.AF_INET6
        message["table"], message["action"] = table, _FR_ACT_TO_TBL
        message["attrs"] = [("FRA_FWMARK", mark), ("FRA_TABLE", table)]
        self._do(message, RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL)

    def number(self, netns_fd: int, nsid: int) -> int:
        """Give another namespace a number (nsid) in this one; returns the one it has, `nsid` unless it had one before.

        It keeps the number as long as it exists and is not kept by it. RTM_NEWNSID, Linux 4.0. Raises OSError:
        FileExistsError when the number is taken.
        """
        try:
            self._do(_nsid_message(("NETNSA_FD", netns_fd), ("NETNSA_NSID", nsid)), RTM_NEWNSID, 0)
        except FileExistsError:
            (known,) = self._ask(_nsid_message(("NETNSA_FD", netns_fd)), RTM_GETNSID, NLM_F_ACK)
            nsid = known.get_attr("NETNSA_NSID")
            if nsid == _NOT_ASSIGNED:
                raise
        return nsid

    def is_number_alive(self, nsid: int) -> bool:
        """Whether a namespace with this number exists. RTM_GETNSID by number, Linux 5.0. Raises OSError."""
        try:
            self._do(_nsid_message(("NETNSA_NSID", nsid)), RTM_GETNSID, 0)
        except FileNotFoundError:
            return False
        return True

    def _do(self, message: Any, kind: int, flags: int) -> None:
        for _ in self._ask(message, kind, NLM_F_ACK | flags):
            pass

    def _dump(self, message: Any, kind: int) -> list[Any]:
        """Everything of a kind. The kernel says when something has changed in the middle: then it is asked again."""
        for _ in range(_DUMP_TRIES):
            self._is_interrupted = False
            replies = list(self._ask(message, kind, NLM_F_DUMP))
            if not self._is_interrupted:
                break
        return replies

    def _ask(self, message: Any, kind: int, flags: int) -> Iterator[Any]:
        """Send one request and yield the replies up to the end or the acknowledgement. Raises OSError."""
        message["header"].update(type=kind, flags=NLM_F_REQUEST | flags, sequence_number=SEQUENCE)
        message.encode()
        self._socket.send(message.data)
        while True:
            for reply in self._parser.parse(self._socket.recv(_BUFFER)):
                if reply["header"]["flags"] & _NLM_F_DUMP_INTR:
                    self._is_interrupted = True
                if reply["header"]["type"] == NLMSG_ERROR:
                    if error := reply["header"]["error"]:
                        raise OSError(error.code, os.strerror(error.code))
                    return
                if reply["header"]["type"] == NLMSG_DONE:
                    return
                yield reply


def listen(groups: Iterable[int], room: int) -> socket.socket:
    """A socket that hears multicast groups of the calling thread's namespace and of all that have a number in it.

    It does not block and has `room` bytes for what is not read yet. Linux 4.2; CAP_NET_ADMIN for the room,
    CAP_NET_BROADCAST in each namespace's user namespace to hear it. Raises OSError.
    """
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    with ExitStack() as undo:
        undo.callback(listening.close)
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room)
        listening.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
        # A change made with NLM_F_ECHO is not told to sockets that have the port of its maker, in whichever namespace
        # (do_one_broadcast in af_netlink.c). Ports are usually process ids: take what none can be.
        listening.bind((1 << 31 | secrets.randbits(31), 0))
        for group in groups:
            listening.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        undo.pop_all()
    return listening


def _nsid_message(*attributes: tuple[str, int]) -> Any:
    message = nsidmsg()
    message["attrs"] = list(attributes)
    return message
