"""A pod's network namespace, seen from inside: cookie, addresses, interfaces, routes. Nothing is changed here.

The kernel lets a thread, not only a process, enter a namespace. Every visit is a thread of its own that ends inside:
there is no way back that could fail and leave a worker in the wrong pod.
"""

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from typing import TypeVar

from cni.errors import SandboxInvalid
from cni.rtnl import IpAddress, IpNetwork, Route, Rtnl

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # uapi/linux/sched.h
_NS_GET_NSTYPE = 0xB703  # uapi/linux/nsfs.h
_SO_NETNS_COOKIE = 71  # uapi/asm-generic/socket.h, Linux 5.14
_LIBC = ctypes.CDLL(None, use_errno=True)

# where Istio's inbound clusters and probes dial from in IPv6; 127.0.0.6 needs no address, ::6 does
INBOUND_SOURCE6 = IPv6Address("::6")


@dataclass(frozen=True)
class InterfaceAddress:
    """An address and the interface index it is on."""

    ip: IpAddress
    ifindex: int


@dataclass(frozen=True)
class Routing:
    """Interfaces by name and where each prefix leaves, both as interface indices."""

    interfaces: Mapping[str, int] = field(default_factory=dict)
    routes: Mapping[IpNetwork, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sandbox:
    """What capture needs to know of a pod's namespace. `addresses` is in the kernel's order, loopback left out.

    `routing` is empty unless it was asked for: few pods need it.
    """

    cookie: int
    addresses: tuple[InterfaceAddress, ...]
    routing: Routing = Routing()

    def routable(self, version: int) -> IpAddress | None:
        """The first address of a family (4 or 6) that is not link-local: what the pod is known by."""
        for address in self.addresses:
            if address.ip.version == version and not address.ip.is_link_local:
                return address.ip
        return None

    def captures_ipv6(self, dual_stack: bool) -> bool:
        """Whether Istio would capture IPv6 here: always if it is the first family, else only with ISTIO_DUAL_STACK."""
        if self.routable(6) is None:
            return False
        return dual_stack or self.routable(4) is None


def require_netns(fd: int) -> None:
    """Raise SandboxInvalid unless `fd` is a network namespace."""
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError as error:
        raise SandboxInvalid(f"the descriptor passed as CNI_NETNS is no namespace: {error.strerror}") from error
    if kind != _CLONE_NEWNET:
        raise SandboxInvalid("the descriptor passed as CNI_NETNS is a namespace, but not a network namespace")


def look(rtnl: Rtnl) -> Sandbox:
    """Cookie and addresses of the namespace that the calling thread is in, as `rtnl` is."""
    addresses = tuple(
        InterfaceAddress(ip, ifindex)
        for ip, ifindex in rtnl.addresses()
        # ::6 is on every mesh pod's lo: the programs know it, and an address has one owner
        if not ip.is_loopback and ip != INBOUND_SOURCE6
    )
    return Sandbox(own_cookie(), addresses)


def look_with_routing(rtnl: Rtnl) -> Sandbox:
    """The same with interfaces and the main routing table, of which few pods need to know."""
    routes: dict[IpNetwork, Route] = {}
    for route in rtnl.routes():
        known = routes.get(route.network)
        if known is None or route.metric < known.metric:
            routes[route.network] = route
    routing = Routing(dict(rtnl.links()), {network: route.ifindex for network, route in routes.items()})
    return replace(look(rtnl), routing=routing)


def require_address(sandbox: Sandbox) -> None:
    """Raise SandboxInvalid for a pod that has no address yet: it could not be captured."""
    if sandbox.routable(4) is None and sandbox.routable(6) is None:
        raise SandboxInvalid(
            "no valid local IP address found in CNI_NETNS; sidestep-cni must come after the plugin that gives the pod "
            "its address"
        )


def own_cookie() -> int:
    """The cookie of the calling thread's namespace (SO_NETNS_COOKIE): the key of every per-pod map.

    Unsigned 64-bit, host order, never reused until reboot.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int(struct.unpack("=Q", raw)[0])


def visit(netns_fd: int, work: Callable[[Rtnl], T]) -> T:
    """Run `work` in a thread inside the namespace and hand back its result or exception.

    Raises SandboxInvalid when the namespace can't be entered, or the kernel refuses something there.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            if _LIBC.setns(netns_fd, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            with Rtnl() as rtnl:
                outcome.append(work(rtnl))
        except OSError as error:
            failure.append(
                SandboxInvalid(f"cannot work in the network namespace passed as CNI_NETNS: {error.strerror}")
            )
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=inside, name="sandbox")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
