"""Compiles the programs with BCC in a child process, which loads them and pins programs and maps.

Only this module imports bcc, and only in the child (`python -m bpf.compiler WHAT MAPS PROGRAMS`): after compiling, LLVM
keeps some 120 MiB, which go when the child ends. The sources are joined as text into one unit, because BCC makes
programs only of functions in its main file. `#line` makes the compiler's messages name our files and lines.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.errors import CompileFailed, LibraryMissing
from bpf.hooks import DEATH_HOOKS, HOOKS, ITERATOR_HOOK, MESSAGE_HOOK, NETNS_HOOK, Hook
from bpf.offsets import LISTENERS, TASKS, NoOffsets, definitions
from bpf.steering import keep
from bpf.syscalls import Descriptor

HERE = Path(__file__).parent
_LINES_SHOWN = 40  # from the end of a verifier's log, where the reason is
_NO_BCC = 3  # exit status of the child
NOT_PERMITTED = os.strerror(errno.EPERM)
# libbcc's line about a map that the kernel refuses
_MAP_REFUSED = re.compile(r"could not open bpf map: (\w+), error: (.+)")
# For a program that the kernel refuses, libbcc writes this before the error, and the verifier's log. Lines of the log
# that begin with these words are not the reason.
_PROGRAM_REFUSED = "bpf: Failed to load program: "
_VERIFIER_STATISTICS = ("processed ", "verification time ", "stack depth ", "HINT: ")

# joined into one unit in this order: maps, then pure headers, then the files that use them
SOURCES = (
    "maps.h",
    "address.h",
    "policy.h",
    "sockaddr.c",
    "owner.c",
    "facts.c",
    "events.c",
    "calls.c",
    "connect.c",
    "datagram.c",
    "bind.c",
    "reading.h",
    "pairing.c",
    "message.c",
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
    BPF_F_TABLE(kind ":" SIDESTEP_MAPS "/" #name, key_t, value_t, name, size, flags);
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
    __attribute__((section("maps/sockhash:" SIDESTEP_MAPS "/" #name))) \\
    struct name##_table_t name = {.max_entries = (size), .flags = 0}; \\
    BPF_ANNOTATE_KV_PAIR(name, key_t, value_t);
#define RING(name, bytes) \\
    struct name##_table_t { \\
        int key; \\
        u32 leaf; \\
        int (*ringbuf_output)(void *, u64, u64); \\
        u32 max_entries; \\
    }; \\
    __attribute__((section("maps/ringbuf:" SIDESTEP_MAPS "/" #name))) \\
    struct name##_table_t name = {.max_entries = (bytes)};
#define SOCKET_STORAGE(value_t, name) \\
    struct name##_table_t { \\
        int key; \\
        value_t leaf; \\
        value_t *(*sk_storage_get)(void *, void *, int); \\
        int (*sk_storage_delete)(void *); \\
        u32 flags; \\
    }; \\
    __attribute__((section("maps/sk_storage:" SIDESTEP_MAPS "/" #name))) \\
    struct name##_table_t name = {.flags = NO_PREALLOC}; \\
    BPF_ANNOTATE_KV_PAIR(name, int, value_t);
"""


# Defined if programs for calls of processes may ask who calls and may choose the errno (calls.c): both since Linux 6.1.
_CALLER = "#define CALLER\n#define RETVAL\n"

# the programs that `sidestep trace` loads, which use the pinned maps of the others; hook → its raw tracepoint
DEATH_SOURCES = ("maps.h", "address.h", "reading.h", "events.c", "deaths.c")


def sources_digest() -> bytes:
    """SHA-256 of all sources that the programs are made from: 32 bytes, stored in the map `build`."""
    digest = hashlib.sha256(PROLOGUE.encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    digest.update(repr(HOOKS).encode())
    return digest.digest()


def compile_and_pin(maps: Path, programs: Path) -> None:
    """Compile in a child and pin the programs in the directory `programs`.

    Maps that are pinned in the directory `maps` are used; missing ones are made and pinned there. Raises CompileFailed
    with the last lines of the compiler or verifier, LibraryMissing without bcc.
    """
    child = _run("all", maps, programs)
    if child.returncode != 0:
        words = "\n".join(child.stderr.strip().splitlines()[-_LINES_SHOWN:])
        raise CompileFailed(f"the BPF programs in {HERE} do not load on this kernel:\n{words}")


def compile_deaths(maps: Path, programs: Path) -> None:
    """The same for the programs that see processes die (deaths.c).

    Raises CompileFailed with one line, LibraryMissing without bcc.
    """
    child = _run("deaths", maps, programs)
    if child.returncode != 0:
        raise CompileFailed(_last_words(child))


@dataclass(frozen=True)
class Refused:
    """The maps and programs that a kernel refuses: name → reason.

    The reason is NOT_PERMITTED if the kernel refuses because this process lacks a permission.
    """

    maps: dict[str, str]  # if a map is refused, no program is tried
    programs: dict[str, str]  # by name of the hook; the reason is the verifier's last line


def try_each(scratch: Path) -> Refused:
    """Compile in a child, make every map and load every program by itself; nothing is attached.

    Acceleration and the naming of callers are not tried, because capture works without them. `scratch` is an empty
    directory on a bpffs. The maps are pinned there and stay. Raises CompileFailed with one line, LibraryMissing without
    bcc.
    """
    child = _run("each", scratch)
    if child.returncode != 0:
        raise CompileFailed(_last_words(child))
    return Refused(**json.loads(child.stdout))


def _run(what: str, *directories: Path) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "bpf.compiler", what, *map(str, directories)]
    child = subprocess.run(argv, cwd=HERE.parent, capture_output=True, text=True, errors="replace")
    if child.returncode == _NO_BCC:
        raise LibraryMissing("bcc is not there; install it: the package python3-bpfcc on Debian and Ubuntu")
    return child


def _last_words(child: "subprocess.CompletedProcess[str]") -> str:
    """The last line with an error. bcc's very last line is useless: it says only that there was an error."""
    lines = child.stderr.strip().splitlines()
    errors = [line for line in lines if "error: " in line]
    return " ".join((errors or lines)[-1:]) or "the compiler failed and printed nothing"


def _compiled(maps: Path, sources: tuple[str, ...], offsets: str) -> Any:
    parts = [f'#define SIDESTEP_MAPS "{maps}"\n', offsets, PROLOGUE]
    for name in sources:
        parts.append(f'#line 1 "bpf/{name}"\n{(HERE / name).read_text()}\n')
    os.environ["BCC_KERNEL_SOURCE"] = str(HERE / "uapi")
    from bcc import BPF  # the only import of bcc: see the module's docstring

    return BPF(text="".join(parts), cflags=["-Wno-macro-redefined"])


def _acceleration() -> str:
    """The macros with which acceleration is compiled in; empty if this kernel does not allow it."""
    try:
        return f"#define ACCELERATION\n{definitions()}"
    except NoOffsets:
        return ""


def _load(unit: Any, hook: Hook) -> Any:
    return unit.load_func(hook.function, hook.program_type, None, hook.attach_type)


def _iterator() -> str:
    """The macros with which the iterator over listeners is compiled in; empty if this kernel does not allow it."""
    try:
        return f"#define ITERATOR\n{definitions(LISTENERS)}"
    except NoOffsets:
        return ""


def _main_all(maps: Path, programs: Path) -> None:
    unit, loaded = _loaded(maps)
    for hook, program in loaded.items():
        syscalls.pin(program.fd, programs / hook.name)
    # Capture works without these. Without the first the node's level is off, without the second the agent finds
    # listeners in another way.
    for hook in (MESSAGE_HOOK, ITERATOR_HOOK):
        with suppress(Exception):  # bcc raises nothing narrower
            syscalls.pin(_load(unit, hook).fd, programs / hook.name)
    # last: from here on pods are enrolled with it
    with Descriptor(syscalls.open_pin(maps / "steering")) as steering:
        keep(steering.fd, unit.dump_func(NETNS_HOOK.function), _name_of_map)


def _name_of_map(fd: int) -> str:
    return str(syscalls.map_info(fd).name.decode())


def _loaded(maps: Path) -> tuple[Any, dict[Hook, Any]]:
    """The programs that capture, with as many extras as this kernel takes.

    The extras are acceleration and the naming of callers. First both are tried, then each alone, then neither. All have
    the iterator with them, and only if it does not even compile they are tried without it.
    """
    extras = (_CALLER + _acceleration(), _acceleration(), _CALLER, "")
    *better, plainest = dict.fromkeys((*(each + _iterator() for each in extras), *extras))
    for macros in better:
        with suppress(Exception):  # bcc raises nothing narrower
            return _loaded_with(maps, macros)
    return _loaded_with(maps, plainest)


def _loaded_with(maps: Path, macros: str) -> tuple[Any, dict[Hook, Any]]:
    unit = _compiled(maps, SOURCES, macros)
    return unit, {hook: _load(unit, hook) for hook in HOOKS}


def _main_each(maps: Path) -> None:
    refused = Refused({}, {})
    try:
        with _overheard() as said:
            unit = _compiled(maps, SOURCES, "")
    except Exception:  # bcc raises nothing narrower
        sys.stderr.write("\n".join(said) + "\n")
        refused.maps.update((found[1], found[2]) for line in said if (found := _MAP_REFUSED.search(line)))
        if not refused.maps:
            raise
    for hook in () if refused.maps else HOOKS:
        try:
            with _overheard() as said:
                _load(unit, hook)
        except Exception as error:  # bcc raises nothing narrower
            is_permitted = ctypes.get_errno() != errno.EPERM
            refused.programs[hook.name] = _verifiers_last_line(said, str(error)) if is_permitted else NOT_PERMITTED
    sys.stdout.write(json.dumps(vars(refused)))


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect the lines that are written to stderr in the with block; libbcc reports errors nowhere else.

    The list is filled when the block ends.
    """
    lines: list[str] = []
    kept = os.dup(2)
    with open(os.memfd_create("stderr"), "w+", errors="replace") as heard:  # noqa: PTH123
        os.dup2(heard.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            heard.seek(0)
            lines += heard.read().splitlines()


def _verifiers_last_line(log: list[str], otherwise: str) -> str:
    lines = [line for line in log if line.strip() and not line.startswith(_VERIFIER_STATISTICS)]
    return lines[-1].removeprefix(_PROGRAM_REFUSED) if lines else otherwise


def _main_deaths(maps: Path, programs: Path) -> None:
    unit = _compiled(maps, DEATH_SOURCES, definitions(TASKS))
    for hook in DEATH_HOOKS:
        syscalls.pin(_load(unit, hook).fd, programs / hook.name)


if __name__ == "__main__":
    try:
        mains: dict[str, Callable[..., None]] = {"all": _main_all, "each": _main_each, "deaths": _main_deaths}
        mains[sys.argv[1]](*map(Path, sys.argv[2:]))
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_NO_BCC)
    except Exception as error:  # bcc raises nothing narrower; compiler and verifier have written to stderr already
        sys.exit(str(error))
