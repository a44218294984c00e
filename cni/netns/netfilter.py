"""Is a pod captured by Istio's own netfilter rules? Two ways at once would be one too many.

A pod that Istio's plugin has set up keeps its rules for life. What they redirect arrives at the proxy's own port, which
sidestep would then give as the original destination: the pod's inbound connections would end in a black hole.
"""

import ctypes
import re
import socket
import struct
from contextlib import suppress
from pathlib import Path

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.main import NFTables

# what Istio calls its chains: by iptables (either kind), and natively
_CHAINS = re.compile(rb"istio[_-](inbound|output|redirect|prert)", re.IGNORECASE)

# uapi/linux/netfilter_ipv4/ip_tables.h: struct ipt_getinfo, struct ipt_get_entries
_IPT_SO_GET_INFO, _IPT_SO_GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32s13I")
_ENTRIES = struct.Struct("=32sI4x")
_LIBC = ctypes.CDLL(None, use_errno=True)


def is_captured_by_istio() -> bool:
    """Whether the calling thread's namespace has chains of Istio's. A kernel without netfilter has none."""
    return any(_CHAINS.search(each) for each in (*_nft_chains(), *map(_xt_entries, _xt_tables())))


def _nft_chains() -> list[bytes]:
    """The names of all nf_tables chains, whatever their family."""
    with suppress(OSError, NetlinkError), NFTables(nfgen_family=socket.AF_UNSPEC) as asking:
        return [str(chain.get_attr("NFTA_CHAIN_NAME")).encode() for chain in asking.get_chains()]
    return []


def _xt_tables() -> list[bytes]:
    """The iptables-legacy tables that exist; asking for one by name would make it."""
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
    """getsockopt() with a question in its buffer, which Python's has not."""
    buffer, length = ctypes.create_string_buffer(question, len(question)), ctypes.c_uint32(len(question))
    if _LIBC.getsockopt(asking.fileno(), socket.SOL_IP, option, buffer, ctypes.byref(length)) != 0:
        raise OSError(ctypes.get_errno(), "getsockopt")
    return buffer.raw
