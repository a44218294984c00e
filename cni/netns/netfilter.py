"""Finds out whether Istio's own netfilter rules capture a pod. sidestep leaves such a pod alone until it is told to.

A pod that Istio's plugin has set up keeps its rules for life, unless `sidestep takeover` removes them. With both,
either may redirect a connection. The proxy is told the right original destination (bpf/sockopt.c), but what sidestep
says of the pod would not be the whole truth.
"""

import ctypes
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

# the names of Istio's chains: made with iptables (legacy or nft), or with nftables itself
_CHAINS = re.compile(rb"istio[_-](inbound|output|redirect|prert)", re.IGNORECASE)

# uapi/linux/netfilter_ipv4/ip_tables.h: struct ipt_getinfo, struct ipt_get_entries; ip6_tables.h has the same for IPv6
_IPT_SO_GET_INFO, _IPT_SO_GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32s13I")
_ENTRIES = struct.Struct("=32sI4x")
# uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h: a nlmsghdr and a nfgenmsg that ask for all chains
_NETLINK_NETFILTER = 12
_REQUEST = struct.Struct("=IHHIIBBH")
_HEADER = struct.Struct("=IH")  # length and type of a nlmsghdr; flags, sequence and port follow
_GETCHAIN, _DUMP = 10 << 8 | 4, 0x301  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN; NLM_F_REQUEST | NLM_F_DUMP
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NETLINK_ROOM = 1 << 16  # bytes; the kernel sends less at once
_NETLINK_SECONDS = 2.0
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Family(NamedTuple):
    """A family of iptables-legacy: of sockets, the level of its options, and the file with the names of its tables."""

    number: int
    level: int
    names: Path


_FAMILIES = (
    _Family(socket.AF_INET, socket.SOL_IP, Path("/proc/thread-self/net/ip_tables_names")),
    _Family(socket.AF_INET6, socket.IPPROTO_IPV6, Path("/proc/thread-self/net/ip6_tables_names")),
)


def is_captured_by_istio() -> bool:
    """Whether the calling thread's namespace has chains of Istio's. Without netfilter in the kernel, it has none."""
    legacy = (_xt_entries(family, table) for family in _FAMILIES for table in _xt_tables(family))
    return any(_CHAINS.search(each) for each in chain(_nft_chains(), legacy))


def _nft_chains() -> Iterator[bytes]:
    """The kernel's messages about all nf_tables chains, of all families.

    Every ADD asks, and pyroute2 would take a millisecond to set itself up. The names are found in the messages as they
    are, so nothing has to be parsed but the end.
    """
    with suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as asking:
        asking.settimeout(_NETLINK_SECONDS)
        asking.send(_REQUEST.pack(_REQUEST.size, _GETCHAIN, _DUMP, 1, 0, socket.AF_UNSPEC, 0, 0))
        while True:
            answer = asking.recv(_NETLINK_ROOM)
            yield answer
            at = 0
            while at + _HEADER.size <= len(answer):
                length, kind = _HEADER.unpack_from(answer, at)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < _HEADER.size:
                    return
                at += -(-length // 4) * 4


def _xt_tables(family: _Family) -> list[bytes]:
    """The iptables-legacy tables that exist. To ask the kernel for a table by name would make it."""
    with suppress(OSError):
        return family.names.read_bytes().split()
    return []


def _xt_entries(family: _Family, table: bytes) -> bytes:
    with suppress(OSError), socket.socket(family.number, socket.SOCK_DGRAM) as asking:
        info = _ask(asking, family.level, _IPT_SO_GET_INFO, _INFO.pack(table, *[0] * 13))
        size = _INFO.unpack(info)[-1]
        return _ask(asking, family.level, _IPT_SO_GET_ENTRIES, _ENTRIES.pack(table, size) + bytes(size))
    return b""


def _ask(asking: socket.socket, level: int, option: int, question: bytes) -> bytes:
    """getsockopt() with a question in its buffer. Python's getsockopt() cannot pass one."""
    buffer, length = ctypes.create_string_buffer(question, len(question)), ctypes.c_uint32(len(question))
    if _LIBC.getsockopt(asking.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        raise OSError(ctypes.get_errno(), "getsockopt")
    return buffer.raw
