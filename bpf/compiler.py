"""Compiles the programs with BCC into bytecode, which loader.py loads.

Only this module imports bcc, and only in a child process (loader.py): after compiling, LLVM keeps some 120 MiB, which
go when the child ends. The sources are joined as text into one unit, because BCC makes programs only of functions in
its main file. `#line` makes the compiler's messages name our files and lines. BCC makes a unit's maps when it compiles,
and they go with the unit: loader.py makes those that are used.
"""

import ctypes
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.bytecode import Bytecode, Map, portable
from bpf.errors import CompileFailed
from bpf.extras import EXTRAS, left_out
from bpf.hooks import HOOKS, Hook

HERE = Path(__file__).parent

# joined into one unit in this order: maps, then pure headers, then the files that use them
SOURCES = (
    "maps.h",
    "address.h",
    "policy.h",
    "ambient_policy.h",
    "sockaddr.c",
    "owner.c",
    "facts.c",
    "events.c",
    "uncaptured.c",
    "create.c",
    "calls.c",
    "shadow.c",
    "connect.c",
    "datagram.c",
    "bind.c",
    "reading.h",
    "pairing.c",
    "room.c",
    "message.c",
    "flows.c",
    "sockops.c",
    "sockopt.c",
    "lookup.c",
    "iterator.c",
)

# BCC's forms of the macros with which maps.h declares maps. SOCKET_TABLE does not use BCC's own macro, which has no
# lookup. NO_PREALLOC is BPF_F_NO_PREALLOC (uapi/linux/bpf.h): an entry takes memory only once it exists; lpm_trie and
# sk_storage maps require the flag.
PROLOGUE = """
#define NO_PREALLOC 1
#define TABLE(kind, key_t, value_t, name, size, flags) \\
    BPF_F_TABLE(kind, key_t, value_t, name, size, flags);
#define SOCKET_TABLE(key_t, value_t, name, size) \\
    struct name##_table_t { \\
        key_t key; \\
        value_t leaf; \\
        value_t *(*lookup)(key_t *); \\
        int (*delete)(key_t *); \\
        int (*insert)(key_t *, void *); \\
        int (*sock_hash_update)(void *, void *, int); \\
        int (*msg_redirect_hash)(void *, void *, int); \\
        u32 max_entries; \\
        int flags; \\
    }; \\
    __attribute__((section("maps/sockhash"))) \\
    struct name##_table_t name = {.max_entries = (size), .flags = 0}; \\
    BPF_ANNOTATE_KV_PAIR(name, key_t, value_t);
#define RING(name, bytes) \\
    struct name##_table_t { \\
        int key; \\
        u32 leaf; \\
        int (*ringbuf_output)(void *, u64, u64); \\
        u32 max_entries; \\
    }; \\
    __attribute__((section("maps/ringbuf"))) \\
    struct name##_table_t name = {.max_entries = (bytes)};
#define SOCKET_STORAGE(value_t, name) \\
    struct name##_table_t { \\
        int key; \\
        value_t leaf; \\
        value_t *(*sk_storage_get)(void *, void *, int); \\
        int (*sk_storage_delete)(void *); \\
        u32 flags; \\
    }; \\
    __attribute__((section("maps/sk_storage"))) \\
    struct name##_table_t name = {.flags = NO_PREALLOC}; \\
    BPF_ANNOTATE_KV_PAIR(name, int, value_t);
"""


# the programs that `sidestep trace` loads, which use the pinned maps of the others
DEATH_SOURCES = ("maps.h", "address.h", "reading.h", "events.c", "deaths.c")

_HEADERS = "uapi"  # the folder with the kernel's headers
_FLAGS = ("-Wno-macro-redefined",)
# what says how a unit becomes bytecode
_MAKERS = ("compiler.py", "bytecode.py")
_LIBRARIES = ("libbcc.so", "libLLVM", "libclang-cpp")


def sources_digest() -> bytes:
    """SHA-256 of what the programs are made from: 32 bytes, stored in the map `build`.

    These are the sources, and the extras that the environment leaves out. Raises UnknownExtra.
    """
    digest = hashlib.sha256(PROLOGUE.encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    digest.update(repr((HOOKS, EXTRAS, sorted(left_out()))).encode())
    return digest.digest()


def name_of_bytecode(sources: Collection[str], macros: str, hooks: Collection[Hook]) -> str:
    """SHA-256 of all that the bytecode depends on, but for the compiler, which is told apart by is_compiler().

    The kernel is part of it: BCC adapts programs to the kernel that it runs on. `macros` are #defines for the sources.
    """
    kernel = os.uname()
    headers = sorted(path for path in (HERE / _HEADERS).rglob("*.h"))
    parts = (
        (kernel.release, kernel.version, kernel.machine),
        _joined(sources, macros),
        _FLAGS,
        [(str(path.relative_to(HERE)), path.read_bytes()) for path in headers],
        [(HERE / name).read_bytes() for name in _MAKERS],
        [(hook.name, hook.function) for hook in hooks],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def is_compiler(files: Mapping[str, tuple[int, int]]) -> bool:
    """Whether these files, with their sizes and times, are those of the compiler here."""
    try:
        return bool(files) and all(_state(Path(path)) == state for path, state in files.items())
    except OSError:
        return False


def compiled(sources: Collection[str], macros: str, hooks: Collection[Hook]) -> Bytecode:
    """Compile, and take the programs of these hooks out. Raises CompileFailed, ImportError without bcc.

    The compiler writes its messages to standard error; if the kernel refuses a map, libbcc writes that there too.
    """
    with unit(sources, macros) as made:
        maps, types = _maps(made)
        programs = {hook.name: portable(made.dump_func(hook.function), _name_of_map) for hook in hooks}
        return Bytecode(maps, programs, types, _files_of_compiler())


@contextmanager
def unit(sources: Collection[str], macros: str) -> Iterator[Any]:
    """BCC's object of compiled sources, with its maps, in the with block. Raises CompileFailed, ImportError."""
    os.environ["BCC_KERNEL_SOURCE"] = str(HERE / _HEADERS)
    from bcc import BPF  # the only import of bcc: see the module's docstring

    try:
        made = BPF(text=_joined(sources, macros), cflags=list(_FLAGS))
    except Exception as error:  # bcc raises nothing narrower
        raise CompileFailed(str(error)) from error
    with made:
        yield made


def _joined(sources: Collection[str], macros: str) -> str:
    parts = [macros, PROLOGUE]
    for name in sources:
        parts.append(f'#line 1 "bpf/{name}"\n{(HERE / name).read_text()}\n')
    return "".join(parts)


def _maps(unit: Any) -> tuple[dict[str, Map], bytes]:
    """Every map of a unit, and the types of all of them."""
    from bcc import lib

    module = ctypes.c_void_p(unit.module)
    maps, types = {}, set()
    for number in range(lib.bpf_num_tables(module)):
        info = syscalls.map_info(lib.bpf_table_fd_id(module, ctypes.c_size_t(number)))
        maps[info.name.decode()] = Map(
            info.type,
            info.key_size,
            info.value_size,
            info.max_entries,
            info.map_flags,
            info.btf_key_type_id,
            info.btf_value_type_id,
        )
        types |= {info.btf_id} - {0}
    (btf_id,) = types  # a unit has one BTF
    return maps, syscalls.types_of(btf_id)


def _name_of_map(fd: int) -> str:
    return str(syscalls.map_info(fd).name.decode())


def _files_of_compiler() -> dict[str, tuple[int, int]]:
    """The files that have compiled in this process, with their states."""
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return {str(path): _state(path) for path in sorted(mapped) if path.name.startswith(_LIBRARIES)}


def _state(path: Path) -> tuple[int, int]:
    """What differs if a file is another: its size in bytes, and when it was written, in ns."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
