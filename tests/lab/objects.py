"""Programs and maps of others, loaded through libbpf: what sidestep must live beside."""

import ctypes

from bpf.syscalls import refused

ARRAY, SOCKHASH, SK_MSG = 2, 18, 16  # enum bpf_map_type, enum bpf_prog_type
GIVE_1 = bytes.fromhex("b7000000010000009500000000000000")  # r0 = 1 (SK_PASS, or let it happen); exit
_LIBBPF = ctypes.CDLL("libbpf.so.1", use_errno=True)


class _ProgramOptions(ctypes.Structure):
    """The head of struct bpf_prog_load_opts of libbpf 1 (bpf/bpf.h)."""

    _fields_ = [("size", ctypes.c_size_t), ("attempts", ctypes.c_int), ("expected_attach_type", ctypes.c_int)]


def load_program(kind: int, attach_type: int, name: str) -> int:
    """A program that does nothing; `kind` and `attach_type` are the kernel's numbers. Returns its descriptor."""
    options = _ProgramOptions(ctypes.sizeof(_ProgramOptions), expected_attach_type=attach_type)
    words = name.encode(), b"GPL", GIVE_1, ctypes.c_size_t(len(GIVE_1) // 8)
    fd: int = _LIBBPF.bpf_prog_load(kind, *words, ctypes.byref(options))
    if fd < 0:
        raise refused("bpf_prog_load", name, -fd)
    return fd


def create_sockhash(key_bytes: int, value_bytes: int, entries: int, name: str) -> int:
    """Returns its descriptor."""
    return _create_map(SOCKHASH, key_bytes, value_bytes, entries, name)


def create_array(value_bytes: int, entries: int, name: str) -> int:
    """Returns its descriptor."""
    return _create_map(ARRAY, 4, value_bytes, entries, name)


def _create_map(kind: int, key_bytes: int, value_bytes: int, entries: int, name: str) -> int:
    fd: int = _LIBBPF.bpf_map_create(kind, name.encode(), key_bytes, value_bytes, entries, None)
    if fd < 0:
        raise refused("bpf_map_create", name, -fd)
    return fd
