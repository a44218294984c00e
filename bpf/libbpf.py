"""libbpf.so.1 through ctypes: the one place that opens the library and declares its functions.

BCC is no substitute: it has no links, cannot pin every kind of object, and keeps a compiler in memory. libbpf is small.
"""

import ctypes
from ctypes import c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

from bpf.errors import LibraryMissing

# int (*)(void *context, void *data, size_t size): ring_buffer__consume calls it for each event. If the result is
# negative, ring_buffer__consume takes no further event.
TakeEvent = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)

# Function: the type of its result, then of its arguments (bpf.h, btf.h and libbpf.h of libbpf 1.0). Pointers to structs
# are void *.
_FUNCTIONS = {
    "bpf_obj_get_opts": (c_int, c_char_p, c_void_p),
    "bpf_obj_pin": (c_int, c_int, c_char_p),
    "bpf_map_create": (c_int, c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_btf_load": (c_int, c_char_p, c_size_t, c_void_p),
    "bpf_obj_get_info_by_fd": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_lookup_elem": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_update_elem": (c_int, c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_delete_elem": (c_int, c_int, c_void_p),
    "bpf_map_get_next_key": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_lookup_batch": (c_int, c_int, *[c_void_p] * 6),
    "bpf_map_get_next_id": (c_int, c_uint32, c_void_p),
    "bpf_map_get_fd_by_id": (c_int, c_uint32),
    "bpf_prog_get_fd_by_id": (c_int, c_uint32),
    "bpf_prog_load": (c_int, c_int, c_char_p, c_char_p, c_void_p, c_size_t, c_void_p),
    "bpf_prog_attach": (c_int, c_int, c_int, c_int, c_uint32),
    "bpf_prog_detach2": (c_int, c_int, c_int, c_int),
    "bpf_prog_query": (c_int, c_int, c_int, c_uint32, *[c_void_p] * 3),
    "bpf_link_create": (c_int, c_int, c_int, c_int, c_void_p),
    "bpf_iter_create": (c_int, c_int),
    "bpf_link_update": (c_int, c_int, c_int, c_void_p),
    "bpf_link_detach": (c_int, c_int),
    "bpf_raw_tracepoint_open": (c_int, c_char_p, c_int),
    "ring_buffer__new": (c_void_p, c_int, TakeEvent, c_void_p, c_void_p),
    "ring_buffer__consume": (c_int, c_void_p),
    "ring_buffer__free": (None, c_void_p),
    "btf__load_vmlinux_btf": (c_void_p,),
    "libbpf_find_vmlinux_btf_id": (c_int, c_char_p, c_int),
    "btf__load_from_kernel_by_id": (c_void_p, c_uint32),
    "btf__raw_data": (c_void_p, c_void_p, c_void_p),
    "btf__free": (None, c_void_p),
    "btf__find_by_name_kind": (c_int32, c_void_p, c_char_p, c_uint32),
    "btf__type_by_id": (c_void_p, c_void_p, c_uint32),
    "btf__name_by_offset": (c_char_p, c_void_p, c_uint32),
    "btf__resolve_size": (c_int64, c_void_p, c_uint32),
    "btf__resolve_type": (c_int, c_void_p, c_uint32),
}


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise LibraryMissing(
            f"{error}; install libbpf 1.0 or newer: the package libbpf1 on Debian and Ubuntu, libbpf on Fedora"
        ) from error
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


LIBBPF = _library()
