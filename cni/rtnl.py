"""One rtnetlink conversation in the calling thread's namespace: pyroute2's messages over a plain socket.

pyroute2's IPRoute brings an event loop to every socket it opens, which is most of what an ADD would cost; its message
classes and parser are all that a dump and an address need.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
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
_NSID_NONE = 0xFFFFFFFF  # NETNSA_NSID_NOT_ASSIGNED (-1) as pyroute2 reads it; when setting, "any"
_BUFFER = 1 << 16  # the kernel fills at most 32 KiB a datagram (NLMSG_GOODSIZE and growth)


@dataclass(frozen=True)
class Address:
    """An address of an interface, and the subnet it was given with."""

    ip: IpAddress
    ifindex: int
    subnet: IpNetwork


@dataclass(frozen=True)
class Route:
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

    def addresses(self) -> Iterator[Address]:
        """Every address, in the kernel's order: IPv4 first."""
        for reply in self._dump(ifaddrmsg(), RTM_GETADDR):
            ip = ip_address(reply.get_attr("IFA_LOCAL") or reply.get_attr("IFA_ADDRESS"))
            subnet = ip_network((ip.packed, reply["prefixlen"]), strict=False)
            yield Address(ip, reply["index"], subnet)

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

    def routes(self) -> Iterator[Route]:
        """The main table's unicast routes of both families; of several next hops the first."""
        for reply, network in self._dump_routes(MAIN_TABLE, _RTN_UNICAST):
            hops = reply.get_attr("RTA_MULTIPATH") or ()
            ifindex = reply.get_attr("RTA_OIF") or next((hop["oif"] for hop in hops), None)
            if ifindex:
                yield Route(network, ifindex, reply.get_attr("RTA_PRIORITY") or 0)

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

    def nsid_of(self, netns_fd: int) -> int:
        """The number that another namespace has in this one; it is given one if need be."""
        if (nsid := self._known_nsid(netns_fd)) is None:
            message = nsidmsg()
            message["attrs"] = [("NETNSA_NSID", _NSID_NONE), ("NETNSA_FD", netns_fd)]
            with suppress(FileExistsError):  # somebody else was faster
                self._do(message, RTM_NEWNSID, 0)
            nsid = self._known_nsid(netns_fd)
        if nsid is None:
            raise OSError(errno.ENOENT, "the kernel gives the namespace no id")
        return nsid

    def _known_nsid(self, netns_fd: int) -> int | None:
        message = nsidmsg()
        message["attrs"] = [("NETNSA_FD", netns_fd)]
        nsid = _NSID_NONE
        for reply in self._ask(message, RTM_GETNSID, NLM_F_ACK):
            nsid = reply.get_attr("NETNSA_NSID")
        return None if nsid == _NSID_NONE else int(nsid)

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
        message["header"].update(type=kind, flags=NLM_F_REQUEST | flags, sequence_number=1)
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
