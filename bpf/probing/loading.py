"""Loading small programs and maps through libbpf without BCC: what the probe needs.

Every function raises KernelRefused; its `errno` says why, and for a program its message ends with the verifier's.
"""

import ctypes

from bpf.syscalls import Descriptor, refused

_LIBBPF = ctypes.CDLL("libbpf.so.1", use_errno=True)
_LOG_BYTES = 1 << 16

ARRAY, HASH, LRU_HASH, LPM_TRIE, SOCKHASH, SK_STORAGE = 2, 1, 9, 11, 18, 24  # enum bpf_map_type
NO_PREALLOC = 1  # BPF_F_NO_PREALLOC


class _ProgramOptions(ctypes.Structure):
    """struct bpf_prog_load_opts of libbpf 1 (bpf/bpf.h), to the end of what Debian 12's knows."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    ]


class _MapOptions(ctypes.Structure):
    """struct bpf_map_create_opts of libbpf 1 (bpf/bpf.h)."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    ]


_LIBBPF.bpf_prog_load.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.POINTER(_ProgramOptions),
]
_LIBBPF.bpf_map_create.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.POINTER(_MapOptions),
]
_LIBBPF.bpf_btf_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]


def load_program(kind: int, attach_type: int, instructions: bytes, name: str) -> int:
    """Load a GPL program; returns its descriptor. `kind` and `attach_type` are the kernel's numbers."""
    options = _ProgramOptions(ctypes.sizeof(_ProgramOptions), attempts=1, expected_attach_type=attach_type)
    fd = _load(kind, instructions, name, options)
    if fd >= 0:
        return fd
    number = ctypes.get_errno() or -fd
    log = ctypes.create_string_buffer(_LOG_BYTES)
    options.log_level, options.log_size = 1, _LOG_BYTES
    options.log_buf = ctypes.cast(log, ctypes.c_char_p)
    again = _load(kind, instructions, name, options)
    if again >= 0:
        return again
    error = refused("bpf_prog_load", name, number)
    if said := _last_words(log.value.decode(errors="replace")):
        error.args = (f"{error}: {said}",)
    raise error


def _load(kind: int, instructions: bytes, name: str, options: _ProgramOptions) -> int:
    loaded: int = _LIBBPF.bpf_prog_load(
        kind, name.encode(), b"GPL", instructions, len(instructions) // 8, ctypes.byref(options)
    )
    return loaded


def _last_words(log: str) -> str:
    """The line of a verifier's log that says what is wrong: the last one that is no statistics."""
    lines = [line for line in log.splitlines() if line and not line.startswith(("processed ", "verification time"))]
    return lines[-1] if lines else ""


def create_map(kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int, name: str) -> int:
    """Create a map; returns its descriptor."""
    options = _MapOptions(ctypes.sizeof(_MapOptions), map_flags=flags)
    return _create(kind, key_bytes, value_bytes, entries, name, options)


def create_storage(name: str) -> int:
    """Create a socket storage of one 32-bit number; this kind of map needs its types told in BTF."""
    with Descriptor(_integer_btf()) as btf:
        options = _MapOptions(ctypes.sizeof(_MapOptions), map_flags=NO_PREALLOC)
        options.btf_fd, options.btf_key_type_id, options.btf_value_type_id = btf.fd, 1, 1
        return _create(SK_STORAGE, 4, 4, 0, name, options)


def _create(kind: int, key_bytes: int, value_bytes: int, entries: int, name: str, options: _MapOptions) -> int:
    fd: int = _LIBBPF.bpf_map_create(kind, name.encode(), key_bytes, value_bytes, entries, ctypes.byref(options))
    if fd < 0:
        raise refused("bpf_map_create", name, ctypes.get_errno() or -fd)
    return fd


def _integer_btf() -> int:
    """BTF with one type, `int`, number 1 (Documentation/bpf/btf.rst)."""
    strings = b"\0int\0"
    kind_int, signed, bits = 1 << 24, 1 << 24, 32
    types = b"".join(number.to_bytes(4, "little") for number in (1, kind_int, 4, signed | bits))
    magic, version, flags = 0xEB9F, 1, 0
    header = magic.to_bytes(2, "little") + bytes([version, flags])
    header += b"".join(n.to_bytes(4, "little") for n in (24, 0, len(types), len(types), len(strings)))
    blob = header + types + strings
    fd: int = _LIBBPF.bpf_btf_load(blob, len(blob), None)
    if fd < 0:
        raise refused("bpf_btf_load", "int", ctypes.get_errno() or -fd)
    return fd
