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

# what Istio calls its chains: by iptables (either kind), and natively
_CHAINS = re.compile(rb"istio[_-](inbound|output|redirect|prert)", re.IGNORECASE)

# uapi/linux/netfilter/nfnetlink.h and nf_tables.h, netlink.h
_NETLINK_NETFILTER, _GET_CHAINS = 12, 10 << 8 | 4
_REQUEST_DUMP, _NLMSG_ERROR, _NLMSG_DONE = 0x301, 2, 3
_HEADER = struct.Struct("=IHHII")

# uapi/linux/netfilter_ipv4/ip_tables.h: struct ipt_getinfo, struct ipt_get_entries
_IPT_SO_GET_INFO, _IPT_SO_GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32s13I")
_ENTRIES = struct.Struct("=32sI4x")
_LIBC = ctypes.CDLL(None, use_errno=True)


def is_captured_by_istio() -> bool:
    """Whether the calling thread's namespace has chains of Istio's. A kernel without netfilter has none."""
    return bool(_CHAINS.search(_nft_chains()) or any(_CHAINS.search(_xt_entries(table)) for table in _xt_tables()))


def _nft_chains() -> bytes:
    """All nf_tables chains as the kernel tells them; names are in them as text."""
    answer = b""
    with suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as asking:
        asking.settimeout(5)
        asking.send(_HEADER.pack(_HEADER.size + 4, _GET_CHAINS, _REQUEST_DUMP, 1, 0) + bytes(4))
        while True:
            part = asking.recv(1 << 16)
            answer += part
            if _is_last(part):
                return answer
    return answer


def _is_last(part: bytes) -> bool:
    offset = 0
    while offset + _HEADER.size <= len(part):
        length, kind, *_ = _HEADER.unpack_from(part, offset)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR):
            return True
        offset += max(_HEADER.size, (length + 3) & ~3)
    return False


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
