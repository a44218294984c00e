"""Finds out whether Istio's own netfilter rules capture a pod. sidestep must leave such a pod alone.

A pod that Istio's plugin has set up keeps its rules for life. Connections that the rules redirect arrive at the proxy's
own port. If sidestep captured the pod too, it would name this port as the original destination, and the pod's inbound
connections would be lost.
"""

import ctypes
import re
import socket
import struct
from contextlib import suppress
from pathlib import Path

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.main import NFTables

# the names of Istio's chains: made with iptables (legacy or nft), or with nftables itself
_CHAINS = re.compile(rb"istio[_-](inbound|output|redirect|prert)", re.IGNORECASE)

# uapi/linux/netfilter_ipv4/ip_tables.h: struct ipt_getinfo, struct ipt_get_entries
_IPT_SO_GET_INFO, _IPT_SO_GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32s13I")
_ENTRIES = struct.Struct("=32sI4x")
_LIBC = ctypes.CDLL(None, use_errno=True)


def is_captured_by_istio() -> bool:
    """Whether the calling thread's namespace has chains of Istio's. Without netfilter in the kernel, it has none."""
    return any(_CHAINS.search(each) for each in (*_nft_chains(), *map(_xt_entries, _xt_tables())))


def _nft_chains() -> list[bytes]:
    """The names of all nf_tables chains, of all families."""
    with suppress(OSError, NetlinkError), NFTables(nfgen_family=socket.AF_UNSPEC) as asking:
        return [str(chain.get_attr("NFTA_CHAIN_NAME")).encode() for chain in asking.get_chains()]
    return []


def _xt_tables() -> list[bytes]:
    """The iptables-legacy tables that exist. To ask the kernel for a table by name would make it."""
    with suppress(OSError):
        return Path("/proc/thread-self/net/ip_tables_names").read_bytes().split()
    return []


def _xt_entries(table: bytes) -> bytes:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        info = _ask(asking, _IPT_SO_GET_INFO, _INFO.pack(table, *[0] * 13))
        size = _INFO.unpack(info)[-1]
        return _ask(asking, _IPT_SO_GET_ENTRIES, _ENTRIES.pack(table, size) + bytes(size))
    return b""


def _ask(asking: socket.socket, option: int, question: bytes) -> bytes:
    """getsockopt() with a question in its buffer. Python's getsockopt() cannot pass one."""
    buffer, length = ctypes.create_string_buffer(question, len(question)), ctypes.c_uint32(len(question))
    if _LIBC.getsockopt(asking.fileno(), socket.SOL_IP, option, buffer, ctypes.byref(length)) != 0:
        raise OSError(ctypes.get_errno(), "getsockopt")
    return buffer.raw
