"""One rtnetlink conversation in the calling thread's namespace: pyroute2's messages over a plain socket.

pyroute2's IPRoute brings an event loop to every socket it opens, which is most of what an ADD would cost; its message
classes and parser are all that a dump and an address need.
"""

import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)
from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_NEWADDR
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

IpAddress = IPv4Address | IPv6Address
_BUFFER = 1 << 16  # the kernel fills at most 32 KiB a datagram (NLMSG_GOODSIZE and growth)


class Rtnl:
    """Use as a context manager, inside the namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._parser = MarshalRtnl()

    def __enter__(self) -> "Rtnl":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def addresses(self) -> Iterator[tuple[IpAddress, int]]:
        """Every address with its interface's index, in the kernel's order: IPv4 first."""
        for reply in self._ask(ifaddrmsg(), RTM_GETADDR, NLM_F_DUMP):
            yield ip_address(reply.get_attr("IFA_LOCAL") or reply.get_attr("IFA_ADDRESS")), reply["index"]

    def add_address(self, ip: IpAddress, ifindex: int) -> None:
        """Put a host address on an interface. Raises OSError, FileExistsError when it is there already."""
        message = ifaddrmsg()
        message["family"] = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        message["prefixlen"], message["index"] = ip.max_prefixlen, ifindex
        message["attrs"] = [("IFA_LOCAL", str(ip)), ("IFA_ADDRESS", str(ip))]
        for _ in self._ask(message, RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL):
            pass

    def _ask(self, message: Any, kind: int, flags: int) -> Iterator[Any]:
        """Send one request and yield the replies up to the end or the acknowledgement. Raises OSError."""
        message["header"].update(type=kind, flags=NLM_F_REQUEST | flags, sequence_number=1)
        message.encode()
        self._socket.send(message.data)
        while True:
            for reply in self._parser.parse(self._socket.recv(_BUFFER)):
                if reply["header"]["type"] == NLMSG_ERROR:
                    if error := reply["header"]["error"]:
                        raise OSError(error.code, os.strerror(error.code))
                    return
                if reply["header"]["type"] == NLMSG_DONE:
                    return
                yield reply
