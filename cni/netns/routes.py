"""What a namespace's routes and rules say of the packets that its processes send.

Only what the kernel does without any rule of the pod's is known: it asks the tables local, main and default, in this
order. If somebody has added a rule, nothing is said about that family.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from bpf.layout import INBOUND_SOURCE6, SPREAD6
from cni.netns.dumps import attributes

IpNetwork = IPv4Network | IPv6Network

_VERSIONS: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 6}
LO = 1  # ifindex of lo in every namespace
# What the agent makes local. Of a new IPv6 address the kernel writes the route in main first, that in local when it has
# looked for duplicates: for a moment it looks like a way out.
_OURS = {SPREAD6, IPv6Network(INBOUND_SOURCE6)}

# uapi/linux/rtnetlink.h: struct rtmsg is family, dst_len, src_len, tos, table, protocol, scope, type, flags
RTMSG = struct.Struct("=8BI")
_CLONED = 0x200  # RTM_F_CLONED: a cached exception, no route
_DEFAULT, _MAIN, _LOCAL = 253, 254, 255  # tables
_UNICAST, _LOCAL_ROUTE, _BROADCAST, _MULTICAST = 1, 2, 3, 5  # types
_KERNEL = 2  # RTPROT_KERNEL: made with an address
_DST, _OIF, _PRIORITY, _PREFSRC, _MULTIPATH = 1, 4, 6, 7, 9  # attributes
_NUMBER = struct.Struct("=I")
_NEXT_HOP_IFINDEX = 4  # offset in struct rtnexthop
# What connect() fails with, by the type of the route: blackhole, unreachable, prohibit, and throw, after which the
# kernel asks the table "default", which is empty. fib_props in net/ipv4/fib_semantics.c, fib6_prop in net/ipv6/route.c.
_ERRORS = {6: errno.EINVAL, 7: errno.EHOSTUNREACH, 8: errno.EACCES, 9: errno.ENETUNREACH}

# uapi/linux/fib_rules.h: struct fib_rule_hdr has the same size; action is where type is
_TO_TABLE, _INVERT = 1, 0x2
_RULE_PRIORITY, _FWMARK, _SUPPRESS, _RULE_TABLE, _FWMASK, _PROTOCOL = 6, 10, 14, 15, 16, 21
_EVERYBODYS = {_RULE_PRIORITY, _SUPPRESS, _RULE_TABLE, _PROTOCOL}
_USUAL = ({(0, _LOCAL), (32766, _MAIN)}, {(0, _LOCAL), (32766, _MAIN), (32767, _DEFAULT)})  # (priority, table)
_NOT_SUPPRESSED = b"\xff\xff\xff\xff"


class _Found(NamedTuple):
    """A route; `rank` orders those of one prefix, the least counts."""

    network: IpNetwork
    rank: tuple[int, int]  # the local table before main; then by metric
    route: "Route"


@dataclass(frozen=True)
class Route:
    """Where packets for a prefix go.

    `ifindex` is the interface they leave by, LO if they stay in the namespace, 0 if they go nowhere. `error` is the
    errno of a connect() to there, 0 if it may go on; with an interface it is TCP's alone (broadcast). `source` is the
    source address that the route names, in network order; empty for none.
    """

    ifindex: int
    error: int = 0
    source: bytes = b""


NOWHERE = Route(0, errno.ENETUNREACH)
OWN = Route(LO)  # to an address of the namespace: whoever asks knows these


def leads_out(route: Route) -> bool:
    """Whether packets leave by an interface, lo included."""
    return bool(route.ifindex and not route.error)


def known_families(rules: tuple[bytes, ...], routes: Iterable[bytes]) -> frozenset[int]:
    """The versions (4, 6) of which the tables local and main say all, for sockets without a mark.

    `rules` are messages of RTM_GETRULE, `routes` of RTM_GETROUTE. A rule for marks does not matter to other sockets.
    """
    strange = {message[0] for message in routes if message[4] == _DEFAULT}
    return frozenset(version for family, version in _VERSIONS.items() if family not in strange) & _usual(rules)


@lru_cache(maxsize=64)  # they are the same in most pods
def _usual(rules: tuple[bytes, ...]) -> frozenset[int]:
    """The versions that have the kernel's own rules and no other."""
    found: dict[int, set[tuple[int, int]]] = {family: set() for family in _VERSIONS}
    for message in rules:
        told = attributes(message, RTMSG.size)
        if message[0] in found and not _is_for_marks(message, told):
            priority = _NUMBER.unpack(told.get(_RULE_PRIORITY, bytes(4)))[0]
            found[message[0]].add((priority, message[4] if _is_plain(message, told) else -1))
    return frozenset(_VERSIONS[family] for family, those in found.items() if those in _USUAL)


def _is_for_marks(message: bytes, told: dict[int, bytes]) -> bool:
    mark, mask = (int.from_bytes(told.get(kind, bytes(4)), "little") for kind in (_FWMARK, _FWMASK))
    return bool(mark & mask) and not RTMSG.unpack_from(message)[8] & _INVERT


def _is_plain(message: bytes, told: dict[int, bytes]) -> bool:
    """Whether a rule is for all packets, and asks one table."""
    _, dst_len, src_len, tos, _, _, _, action, flags = RTMSG.unpack_from(message)
    is_for_all = not (dst_len or src_len or tos or flags & _INVERT) and told.keys() <= _EVERYBODYS
    return is_for_all and action == _TO_TABLE and told.get(_SUPPRESS, _NOT_SUPPRESSED) == _NOT_SUPPRESSED


def routes_in(messages: Iterable[bytes]) -> dict[IpNetwork, Route]:
    """The routes of the tables main and local by prefix, without those that each address brings along.

    The longest prefix decides, whichever table has it: IPv4 keeps both in one trie. If a longer prefix in main is
    within a local one of IPv6, the kernel would say local. To take it for a way out captures it: the safe mistake.
    Loopback, and what the agent makes local itself, are left out.
    """
    best: dict[IpNetwork, _Found] = {}
    for found in filter(None, map(_route, messages)):
        before = best.get(found.network)
        if before is None or found.rank < before.rank:
            best[found.network] = found
    return {network: found.route for network, found in best.items() if found.route is not OWN}


@lru_cache(maxsize=1024)  # many are the same in all pods of a node
def _route(message: bytes) -> _Found | None:
    """A message of RTM_GETROUTE; None if it does not matter."""
    family, length, src_len, tos, table, protocol, _, kind, flags = RTMSG.unpack_from(message)
    if table not in (_MAIN, _LOCAL) or flags & _CLONED or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    bits = 32 if family == socket.AF_INET else 128
    if table == _LOCAL and kind in _ERRORS:
        return None
    told = attributes(message, RTMSG.size)
    is_special = bool(src_len or tos)  # for some packets alone
    if is_special and kind != _UNICAST:
        return None
    target = told.get(_DST, bytes(bits // 8))
    network = IPv4Network((target, length)) if bits == 32 else IPv6Network((target, length))
    if network.network_address.is_loopback or network in _OURS:
        return None
    metric = _NUMBER.unpack(told.get(_PRIORITY, bytes(4)))[0]
    is_own = table == _LOCAL and protocol == _KERNEL and kind == _LOCAL_ROUTE and length == bits
    route = OWN if is_own else _meaning(kind, told)
    return _Found(network, (int(table == _MAIN), -1 if is_special else metric), route) if route else None


def _meaning(kind: int, told: dict[int, bytes]) -> Route | None:
    if kind in _ERRORS:
        return Route(0, _ERRORS[kind])
    source = told.get(_PREFSRC, b"")
    if kind == _LOCAL_ROUTE:
        return Route(LO, source=source)
    if kind not in (_UNICAST, _BROADCAST, _MULTICAST):
        return None
    hops = told.get(_MULTIPATH)  # of several, the first counts
    ifindex = told.get(_OIF) or (hops and hops[_NEXT_HOP_IFINDEX : _NEXT_HOP_IFINDEX + 4])
    if not ifindex:
        return None
    error = errno.ENETUNREACH if kind == _BROADCAST else 0
    return Route(_NUMBER.unpack(ifindex)[0], error, source)


def needed(routes: dict[IpNetwork, Route], version: int) -> Iterator[tuple[IpNetwork, Route]]:
    """Of one family's routes those without which a reader would take a packet to leave although it does not, or the
    reverse, if whatever matches no route leaves. If there is no default route, NOWHERE stands for it.
    """
    own = {network: route for network, route in routes.items() if network.version == version}
    everything = IPv4Network("0.0.0.0/0") if version == 4 else IPv6Network("::/0")
    elsewhere = {network: route for network, route in own.items() if route.error or route.ifindex == LO}
    if everything in own and all(network.num_addresses == 1 for network in elsewhere):
        yield from elsewhere.items()
        return
    yield from own.items()
    if everything not in own:
        yield everything, NOWHERE
