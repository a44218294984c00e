"""Looks at a pod's network namespace from inside: cookie, addresses, interfaces, routes. Changes nothing.

The kernel lets a single thread enter a network namespace. The thread that visits comes back before it does anything
else. If it could not come back, it would do the next pod's work in the wrong namespace, so the process ends instead.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import chain, islice
from typing import TypeVar

from bpf.layout import INBOUND_SOURCE6
from bpf.syscalls import Descriptor
from cni.errors import SandboxInvalid
from cni.netns.routes import LO, IpNetwork, Route, known_families, leads_out, needed, routes_in
from cni.netns.rtnl import IpAddress, Rtnl

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # uapi/linux/sched.h
_NS_GET_NSTYPE = 0xB703  # uapi/linux/nsfs.h
_SO_NETNS_COOKIE = 71  # uapi/asm-generic/socket.h, Linux 5.14
_OWN = "/proc/thread-self/ns/net"  # the calling thread's own namespace
_LIBC = ctypes.CDLL(None, use_errno=True)

# The most addresses of a pod that are looked at. So no pod can fill the table of all pods' addresses, or keep the agent
# busy.
MAX_ADDRESSES = 512
# The same for routes: the most that are kept, and the most that are read
MAX_ROUTES, MAX_ROUTES_READ = 512, 4096
_MAX_RULES = 64
# for documentation (RFC 5737, RFC 3849): addresses that should have no route of their own
_BEYOND = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}
_LOOPBACK4 = ip_address("127.0.0.1")


@dataclass(frozen=True)
class InterfaceAddress:
    """An address, its interface's index, and the source address of the pod's own connections to it."""

    ip: IpAddress
    ifindex: int
    source: IpAddress


@dataclass(frozen=True)
class Way:
    """Where a route leads: the index of its interface, and the source address that the kernel chooses, if known.

    `error` is the errno of a connect() to there, as in cni/netns/routes.py.
    """

    ifindex: int
    source: IpAddress | None
    error: int = 0


@dataclass(frozen=True)
class Sandbox:
    """What capture needs to know of a pod's namespace.

    `addresses` are in the kernel's order, without loopback, at most MAX_ADDRESSES. `interfaces` are indexes by name.
    `ways` says where prefixes lead, at most MAX_ROUTES. Most pods exclude no interface and have addresses on only one;
    for them, `interfaces` is empty, and `ways` has only what says that a packet does not leave. `loopback_stays`: the
    kernel is known to refuse to send from 127.0.0.0/8 to the outside.
    """

    cookie: int
    addresses: tuple[InterfaceAddress, ...]
    interfaces: Mapping[str, int] = field(default_factory=dict)
    ways: Mapping[IpNetwork, Way] = field(default_factory=dict)
    loopback_stays: bool = False

    @property
    def is_multihomed(self) -> bool:
        """Whether more than one interface has an address that is not link-local."""
        return len({address.ifindex for address in self.addresses if not address.ip.is_link_local}) > 1

    def routable(self, version: int) -> IpAddress | None:
        """The pod's main address of a family (4 or 6): the first that is not link-local."""
        for address in self.addresses:
            if address.ip.version == version and not address.ip.is_link_local:
                return address.ip
        return None

    def source(self, version: int) -> IpAddress | None:
        """The address of a family (4 or 6) that captured connections come from: the main one.

        A pod may reach IPv4 by a link-local address alone, as on EKS with IPv6. Link-local IPv6 addresses reach no
        further than a link.
        """
        link_local = (each.ip for each in self.addresses if each.ip.version == version == 4)
        return self.routable(version) or next(link_local, None)

    def captures_ipv6(self, dual_stack: bool) -> bool:
        """Whether Istio would capture IPv6: if it is the pod's only family or, with ISTIO_DUAL_STACK, its second."""
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


def look(rtnl: Rtnl, excluded_interfaces: Collection[str] = (), ipv6: bool = False) -> Sandbox:
    """Look at the calling thread's namespace, with a conversation in the same namespace.

    If `ipv6`, the routes of IPv6 matter although the pod may have no address of it: then they say that nothing leaves.
    """
    addresses, is_whole = _addresses(rtnl)
    bare = Sandbox(own_cookie(), addresses)
    is_by_interface = bool(excluded_interfaces or bare.is_multihomed)
    if not is_whole and not is_by_interface:  # it may have thousands of routes, and capture does without
        return bare
    routes, known = _routes(rtnl)
    kept = {network: route for network, route in routes.items() if leads_out(route)} if is_by_interface else {}
    for version in known:
        if version == 4 or ipv6 or bare.routable(6):
            kept.update(needed(routes, version))
    if len(kept) > MAX_ROUTES:
        kept = _widest(kept) if is_by_interface else {}
    asked = rtnl if is_by_interface else None
    return Sandbox(
        bare.cookie,
        addresses,
        interfaces=dict(rtnl.links()) if is_by_interface else {},
        ways={network: _way(asked, network, route) for network, route in kept.items()},
        loopback_stays=_loopback_stays(rtnl, routes, addresses),
    )


def _loopback_stays(rtnl: Rtnl, routes: Mapping[IpNetwork, Route], addresses: tuple[InterfaceAddress, ...]) -> bool:
    """Whether the kernel refuses to send from 127.0.0.1 by the widest route of IPv4."""
    beyond_lo = (network for network, route in routes.items() if leads_out(route) and route.ifindex != LO)
    out = [network for network in beyond_lo if network.version == 4]
    network = min(out, key=lambda each: each.prefixlen, default=None)
    stranger = _stranger_in(network, {each.ip for each in addresses}) if network else None
    return stranger is not None and rtnl.refuses(stranger, _LOOPBACK4)


def addresses_in(rtnl: Rtnl) -> Iterator[InterfaceAddress]:
    """The addresses of a namespace in the kernel's order, without loopback.

    If nothing else is needed, this is cheaper than look(): a namespace may have thousands of routes.
    """
    yield from _addresses(rtnl)[0]


def _addresses(rtnl: Rtnl) -> tuple[tuple[InterfaceAddress, ...], bool]:
    """The addresses, and whether these are all."""
    primaries: dict[tuple[int, IpNetwork], IpAddress] = {}
    found = []
    listed = rtnl.addresses(MAX_ADDRESSES)
    for each in listed.found:
        source = primaries.setdefault((each.ifindex, each.subnet), each.ip) if each.ip.version == 4 else each.ip
        # ::6 is on the lo of every mesh pod. The programs know it, and the table has one owner for each address.
        if not each.ip.is_loopback and each.ip != INBOUND_SOURCE6:
            found.append(InterfaceAddress(each.ip, each.ifindex, source))
    return tuple(found), listed.is_whole


def _routes(rtnl: Rtnl) -> tuple[dict[IpNetwork, Route], frozenset[int]]:
    """The routes by prefix, and the versions of which they say all. There may be more than MAX_ROUTES_READ."""
    routes, rules = rtnl.routes(MAX_ROUTES_READ), rtnl.rules(_MAX_RULES)
    found = routes_in(routes.messages)
    if not (routes.is_whole and rules.is_whole):
        return found, frozenset()
    return found, known_families(tuple(rules.messages), routes.messages)


def _widest(routes: Mapping[IpNetwork, Route]) -> dict[IpNetwork, Route]:
    """Of too many routes those that lead out, the widest first: nothing else is known for certain any more."""
    out = (item for item in routes.items() if leads_out(item[1]))
    return dict(sorted(out, key=lambda item: item[0].prefixlen)[:MAX_ROUTES])


def _way(rtnl: Rtnl | None, network: IpNetwork, route: Route) -> Way:
    """A route for the programs. The source that the kernel chooses is asked for if there is a conversation."""
    if rtnl and not route.error and route.ifindex != LO:
        return Way(route.ifindex, rtnl.source_to(_somebody_in(network)), route.error)
    return Way(route.ifindex, ip_address(route.source) if route.source else None, route.error)


def _somebody_in(network: IpNetwork) -> IpAddress:
    """An address in `network`, to ask the kernel for its route."""
    if network.prefixlen == 0:
        return _BEYOND[network.version]
    return network[min(1, network.num_addresses - 1)]


def _stranger_in(network: IpNetwork, own: Collection[IpAddress]) -> IpAddress | None:
    """An address in `network` that the namespace has not itself; None if there is none."""
    some: Iterator[IpAddress] = chain([_somebody_in(network)], islice(network, 2, len(own) + 2))
    return next((each for each in some if each not in own), None)


def require_address(sandbox: Sandbox) -> None:
    """Raise SandboxInvalid if a pod has no address yet, because it could not be captured."""
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
        return cookie_of_socket(probe)


def cookie_of_socket(which: socket.socket) -> int:
    """The cookie of the namespace that a socket was made in."""
    return int(struct.unpack("=Q", which.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


def visit(netns_fd: int, work: Callable[[Rtnl], T]) -> T:
    """Run `work` in the calling thread inside the namespace, then come back. Returns what `work` returns.

    Raises SandboxInvalid if the namespace cannot be entered, and in place of an OSError from `work`. A thread of its
    own for each visit would cost an ADD a tenth of its time.
    """
    try:
        with Descriptor(os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)) as home:
            _enter(netns_fd)
            try:
                with Rtnl() as rtnl:
                    return work(rtnl)
            finally:
                _return(home.fd)
    except OSError as error:
        words = f"cannot work in the network namespace passed as CNI_NETNS: {error.strerror}"
        raise SandboxInvalid(words) from error  # callers that were given no CNI_NETNS show the cause instead


def _enter(netns_fd: int) -> None:
    if _LIBC.setns(netns_fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _return(home: int) -> None:
    try:
        _enter(home)
    except OSError as error:
        os.write(2, f"sidestep ends: it cannot leave a pod's network namespace: {error.strerror}\n".encode())
        os.abort()
