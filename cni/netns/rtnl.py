"""One rtnetlink conversation in the calling thread's namespace: pyroute2's messages over a plain socket.

pyroute2's IPRoute would do only a part of this. It gives each thread a socket of its own, but Watch's has to stay in
the namespace made for it. It numbers its requests itself, but by our number Watch knows what we have changed ourselves.
And it brings an event loop to every socket: an ADD's conversation takes 1.6 ms with it and 0.7 here (0.17 to open one,
0.1 more for each request). So these are its message classes and its parser over a plain socket.
"""

import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from pyroute2 import netlink
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_EVERYTHING = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}

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
        for reply in self._dump(ifaddrmsg(), rtnl.RTM_GETADDR):
            ip = ip_address(reply.get_attr("IFA_LOCAL") or reply.get_attr("IFA_ADDRESS"))
            subnet = ip_network((ip.packed, reply["prefixlen"]), strict=False)
            yield SubnetAddress(ip, reply["index"], subnet)

    def add_address(self, ip: IpAddress, ifindex: int) -> None:
        """Put a host address on an interface. Raises OSError, FileExistsError when it is there already."""
        told = {"IFA_LOCAL": str(ip), "IFA_ADDRESS": str(ip)}
        message = _filled(ifaddrmsg(), told, family=_FAMILIES[ip.version], prefixlen=ip.max_prefixlen, index=ifindex)
        self._do(message, rtnl.RTM_NEWADDR, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)

    def links(self) -> Iterator[tuple[str, int]]:
        """Every interface by name, with its index."""
        for reply in self._dump(ifinfmsg(), rtnl.RTM_GETLINK):
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
        told = {"RTA_DST": str(destination)}
        request = _filled(rtmsg(), told, family=_FAMILIES[destination.version], dst_len=destination.max_prefixlen)
        try:
            replies = list(self._ask(request, rtnl.RTM_GETROUTE, netlink.NLM_F_ACK))
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
        for reply in self._dump(_filled(rtmsg(), {}, family=socket.AF_UNSPEC), rtnl.RTM_GETROUTE):
            everything = _EVERYTHING.get(reply["family"])
            if everything and reply["type"] == kind and (reply.get_attr("RTA_TABLE") or reply["table"]) == table:
                yield reply, ip_network((reply.get_attr("RTA_DST") or everything, reply["dst_len"]))

    def make_local(self, network: IpNetwork, ifindex: int, table: int, source: IpAddress | None) -> None:
        """Have packets for `network` delivered to this namespace; `source` is preferred as theirs.

        Replaces an earlier route for it. Raises OSError, with EINVAL when `source` is not a usable address here (yet).
        """
        told: dict[str, str | int] = {"RTA_TABLE": table, "RTA_OIF": ifindex}
        if network.prefixlen:
            told["RTA_DST"] = str(network.network_address)
        if source is not None:
            told["RTA_PREFSRC"] = str(source)
        where = {"family": _FAMILIES[network.version], "dst_len": network.prefixlen, "table": table}
        message = _filled(rtmsg(), told, **where, type=_RTN_LOCAL, scope=_RT_SCOPE_HOST, proto=_RTPROT_STATIC)
        self._do(message, rtnl.RTM_NEWROUTE, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)

    def route_mark(self, version: int, mark: int, table: int) -> None:
        """Have packets with a firewall mark looked up in a table of their own. Raises FileExistsError on the second."""
        told = {"FRA_FWMARK": mark, "FRA_TABLE": table}
        message = _filled(fibmsg(), told, family=_FAMILIES[version], table=table, action=_FR_ACT_TO_TBL)
        self._do(message, rtnl.RTM_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)

    def number(self, netns_fd: int, nsid: int) -> int:
        """Give another namespace a number (nsid) in this one; returns the one it has, `nsid` unless it had one before.

        It keeps the number as long as it exists and is not kept by it. rtnl.RTM_NEWNSID, Linux 4.0. Raises OSError:
        FileExistsError when the number is taken.
        """
        try:
            self._do(_filled(nsidmsg(), {"NETNSA_FD": netns_fd, "NETNSA_NSID": nsid}), rtnl.RTM_NEWNSID, 0)
        except FileExistsError:
            (known,) = self._ask(_filled(nsidmsg(), {"NETNSA_FD": netns_fd}), rtnl.RTM_GETNSID, netlink.NLM_F_ACK)
            nsid = known.get_attr("NETNSA_NSID")
            if nsid == _NOT_ASSIGNED:
                raise
        return nsid

    def is_number_alive(self, nsid: int) -> bool:
        """Whether a namespace with this number exists. RTM_GETNSID by number, Linux 5.0. Raises OSError."""
        try:
            self._do(_filled(nsidmsg(), {"NETNSA_NSID": nsid}), rtnl.RTM_GETNSID, 0)
        except FileNotFoundError:
            return False
        return True

    def _do(self, message: Any, kind: int, flags: int) -> None:
        for _ in self._ask(message, kind, netlink.NLM_F_ACK | flags):
            pass

    def _dump(self, message: Any, kind: int) -> list[Any]:
        """Everything of a kind. The kernel says when something has changed in the middle: then it is asked again."""
        for _ in range(_DUMP_TRIES):
            self._is_interrupted = False
            replies = list(self._ask(message, kind, netlink.NLM_F_DUMP))
            if not self._is_interrupted:
                break
        return replies

    def _ask(self, message: Any, kind: int, flags: int) -> Iterator[Any]:
        """Send one request and yield the replies up to the end or the acknowledgement. Raises OSError."""
        message["header"].update(type=kind, flags=netlink.NLM_F_REQUEST | flags, sequence_number=SEQUENCE)
        message.encode()
        self._socket.send(message.data)
        while True:
            for reply in self._parser.parse(self._socket.recv(_BUFFER)):
                if reply["header"]["flags"] & _NLM_F_DUMP_INTR:
                    self._is_interrupted = True
                if reply["header"]["type"] == netlink.NLMSG_ERROR:
                    if error := reply["header"]["error"]:
                        raise OSError(error.code, os.strerror(error.code))
                    return
                if reply["header"]["type"] == netlink.NLMSG_DONE:
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
        listening.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_LISTEN_ALL_NSID, 1)
        # A change made with NLM_F_ECHO is not told to sockets that have the port of its maker, in whichever namespace
        # (do_one_broadcast in af_netlink.c). Ports are usually process ids: take what none can be.
        listening.bind((1 << 31 | secrets.randbits(31), 0))
        for group in groups:
            listening.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_ADD_MEMBERSHIP, group)
        undo.pop_all()
    return listening


def _filled(message: Any, attributes: Mapping[str, str | int], **fields: int) -> Any:
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = list(attributes.items())
    return message
