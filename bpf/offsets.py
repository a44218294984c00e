"""The offsets of the kernel's fields that our programs read, from the kernel's type information (BTF).

BCC has no CO-RE relocations, by which other projects get offsets. Our programs are compiled on the node, so the offsets
are compiled in as macros. Only child processes call definitions(): libbpf loads all of vmlinux's types into memory.
"""

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf.libbpf import LIBBPF

# BTF_KIND_STRUCT and BTF_KIND_UNION (uapi/linux/btf.h)
_STRUCT, _UNION = 4, 5
# alignment in bytes by a field's size in bytes; other sizes have 8. A field of 16 bytes may be a task's name, an array
# of characters, so it has 1
_ALIGNMENT = {1: 1, 2: 2, 4: 4, 16: 1}
_ANY = 0  # size of a struct that differs from kernel to kernel
_LOCKDOWN = Path("/sys/kernel/security/lockdown")


class _Type(ctypes.Structure):
    """struct btf_type."""

    _fields_ = [("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class _Member(ctypes.Structure):
    """struct btf_member."""

    _fields_ = [("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


class NoOffsets(Exception):
    """The kernel gives no offsets, or implausible ones, or is locked down so that they are of no use."""


@dataclass(frozen=True)
class Field:
    """A field that programs read: the macro for its offset, its struct and name, and its size in bytes, or _ANY.

    The name of a field of a field has a dot.
    """

    macro: str
    struct: bytes
    name: bytes
    size: int
    optional: bool = False


# acceleration (pairing.c, room.c, message.c). struct tcp_sock begins with struct sock, which begins with struct
# sock_common, so the offsets of all three count from the same address
SOCKETS = (
    Field("TCP_WRITE_SEQ", b"tcp_sock", b"write_seq", 4),
    Field("TCP_COPIED_SEQ", b"tcp_sock", b"copied_seq", 4),
    Field("TCP_IS_MPTCP", b"tcp_sock", b"is_mptcp", 1, optional=True),  # CONFIG_MPTCP
    Field("TCP_ULP_OPS", b"inet_connection_sock", b"icsk_ulp_ops", 8),
    Field("SOCK_PROT", b"sock_common", b"skc_prot", 8),
    Field("SOCK_USER_DATA", b"sock", b"sk_user_data", 8),
    Field("SOCK_SOCKET", b"sock", b"sk_socket", 8),
    Field("SOCKET_FILE", b"socket", b"file", 8),
    Field("FILE_FLAGS", b"file", b"f_flags", 4),
    Field("PROTO_MEMORY_ALLOCATED", b"proto", b"memory_allocated", 8),
    Field("PROTO_SYSCTL_MEM", b"proto", b"sysctl_mem", 8),
    # optional: CONFIG_MEMCG, and CONFIG_MEMCG_V1 for the counter of version 1
    Field("SOCK_MEMCG", b"sock", b"sk_memcg", 8, optional=True),
    Field("MEMCG_MEMORY", b"mem_cgroup", b"memory", _ANY, optional=True),
    Field("MEMCG_TCPMEM", b"mem_cgroup", b"tcpmem", _ANY, optional=True),
    Field("MEMCG_TCPMEM_ACTIVE", b"mem_cgroup", b"tcpmem_active", 1, optional=True),
    Field("COUNTER_USAGE", b"page_counter", b"usage", 8, optional=True),
    Field("COUNTER_MAX", b"page_counter", b"max", 8, optional=True),
    Field("COUNTER_PARENT", b"page_counter", b"parent", 8, optional=True),
    Field("PSOCK_INGRESS_MSG", b"sk_psock", b"ingress_msg", 16),
    Field("PSOCK_MSG_TOT_LEN", b"sk_psock", b"msg_tot_len", 4, optional=True),  # since 6.19, 6.18.14, 6.12.75, 6.6.128
)

# listeners, and who opened them (iterator.c)
LISTENERS = (
    Field("SOCK_FAMILY", b"sock_common", b"skc_family", 2),
    Field("SOCK_STATE", b"sock_common", b"skc_state", 1),
    Field("SOCK_PORT", b"sock_common", b"skc_num", 2),
    Field("SOCK_LOCAL4", b"sock_common", b"skc_rcv_saddr", 4),
    Field("SOCK_LOCAL6", b"sock_common", b"skc_v6_rcv_saddr", 16),
    Field("SOCK_MARK", b"sock", b"sk_mark", 4),
    Field("SOCK_OWNED", b"sock", b"sk_lock.owned", 4),
    Field("SOCK_SOCKET", b"sock", b"sk_socket", 8),
    Field("SOCKET_FILE", b"socket", b"file", 8),
    Field("FILE_CREDENTIALS", b"file", b"f_cred", 8),
    Field("CREDENTIALS_UID", b"cred", b"fsuid", 4),
    Field("CREDENTIALS_GID", b"cred", b"fsgid", 4),
    Field("SOCK_CGROUP", b"sock", b"sk_cgrp_data", _ANY),
    Field("CGROUP_OF_SOCK", b"sock_cgroup_data", b"cgroup", 8),
    Field("CGROUP_NODE", b"cgroup", b"kn", 8),
    Field("NODE_ID", b"kernfs_node", b"id", 8),
)

# a process's pod, and how the process ends (deaths.c)
TASKS = (
    Field("TASK_PID", b"task_struct", b"pid", 4),
    Field("TASK_TGID", b"task_struct", b"tgid", 4),
    Field("TASK_EXIT_CODE", b"task_struct", b"exit_code", 4),
    Field("TASK_COMM", b"task_struct", b"comm", 16),
    Field("TASK_NSPROXY", b"task_struct", b"nsproxy", 8),
    Field("NSPROXY_NET", b"nsproxy", b"net_ns", 8),
    Field("NET_COOKIE", b"net", b"net_cookie", 8),
)


def definitions(fields: Iterable[Field] = SOCKETS) -> str:
    """The offsets of fields in bytes, as C macros, except of optional fields that do not exist. Raises NoOffsets."""
    _require_reading_allowed()
    btf = LIBBPF.btf__load_vmlinux_btf()
    if not btf or ctypes.c_int64(btf).value in range(-4095, 0):
        raise NoOffsets("the kernel has no type information (/sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF)")
    try:
        return "".join(f"#define {field.macro} {at}\n" for field in fields if (at := _offset(btf, field)) is not None)
    finally:
        LIBBPF.btf__free(btf)


def _require_reading_allowed() -> None:
    """Raise NoOffsets if the kernel is locked down for confidentiality (kernel_lockdown(7)).

    Such a kernel does not load programs that read kernel memory.
    """
    try:
        state = _LOCKDOWN.read_text()
    except OSError:  # securityfs is not mounted, or the kernel has no lockdown
        return
    if "[confidentiality]" in state:
        raise NoOffsets("the kernel is locked down (confidentiality): programs may not read its memory")


def _offset(btf: int, field: Field) -> int | None:
    found = LIBBPF.btf__find_by_name_kind(btf, field.struct, _STRUCT)
    if found < 0:
        if field.optional:
            return None
        raise NoOffsets(f"the kernel's type information has no struct {field.struct.decode()}")
    place = _place(btf, found, field.name.split(b"."))
    if place is None:
        if field.optional:
            return None
        raise NoOffsets(f"the kernel's struct {field.struct.decode()} has no field {field.name.decode()}")
    bits, size = place
    whole = LIBBPF.btf__resolve_size(btf, found)
    if size != (field.size or size) or bits % (8 * _ALIGNMENT.get(field.size, 8)) or bits // 8 + size > whole:
        raise NoOffsets(
            f"{field.name.decode()} of the kernel's struct {field.struct.decode()} has {size} bytes at bit {bits} of "
            f"{whole} bytes; expected {field.size} aligned bytes"
        )
    return bits // 8


def _place(btf: int, type_id: int, path: list[bytes], base: int = 0) -> tuple[int, int] | None:
    """Offset in bits and size in bytes of a member, or of a member's member; None if there is none of this name."""
    first, *more = path
    for name, bits, member in _members(btf, type_id, base):
        if name == first:
            if more:
                return _place(btf, LIBBPF.btf__resolve_type(btf, member), more, bits)
            return bits, LIBBPF.btf__resolve_size(btf, member)
    return None


def _members(btf: int, type_id: int, base: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset in bits and type of each member. Nameless structs and unions are replaced by their members.

    `base` is the offset of the type in bits.
    """
    address = LIBBPF.btf__type_by_id(btf, type_id)
    head = _Type.from_address(address)
    members = (_Member * (head.info & 0xFFFF)).from_address(address + ctypes.sizeof(_Type))
    for member in members:
        # if the kind flag is set, the upper byte of the offset is the width of a bit field
        bits = base + (member.offset & 0xFFFFFF if head.info >> 31 else member.offset)
        name = LIBBPF.btf__name_by_offset(btf, member.name)
        if name:
            yield name, bits, member.type
            continue
        inner = LIBBPF.btf__resolve_type(btf, member.type)
        if inner >= 0 and _kind(btf, inner) in (_STRUCT, _UNION):
            yield from _members(btf, inner, bits)


def _kind(btf: int, type_id: int) -> int:
    return int(_Type.from_address(LIBBPF.btf__type_by_id(btf, type_id)).info >> 24 & 0x1F)
