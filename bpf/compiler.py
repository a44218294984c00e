"""BCC in a child process: the program sources become loaded programs and maps, pinned; the child's memory goes with it.

Only this module imports bcc, and only in the child (`python -m bpf.compiler WHAT MAPS PROGRAMS`): once it has compiled,
LLVM stays resident at some 120 MiB. The sources are joined as text into one unit because BCC makes programs only of
functions in its main file; `#line` keeps the compiler's messages pointing at ours.
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
from bpf.hooks import DEATH_HOOKS, HOOKS, MESSAGE_HOOK, NETNS_HOOK, Hook
from bpf.offsets import TASKS, NoOffsets, definitions
from bpf.steering import keep
from bpf.syscalls import Descriptor

HERE = Path(__file__).parent
_LINES_SHOWN = 40  # of a verifier's log, whose end says why
_NO_BCC = 3  # exit status of the child
NOT_PERMITTED = os.strerror(errno.EPERM)
# how libbcc tells of a map; of programs it passes on the verifier's log, with lines that do not say what is wrong
_MAP_REFUSED = re.compile(r"could not open bpf map: (\w+), error: (.+)")
_PROGRAM_REFUSED = "bpf: Failed to load program: "
_VERIFIER_STATISTICS = ("processed ", "verification time ", "stack depth ", "HINT: ")

# one unit, in this order: tables, then pure headers, then what builds on them
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
)

# What maps.h calls TABLE and so on, in BCC's terms. A socket hash is spelled out because BCC's own macro has no lookup.
# NO_PREALLOC is BPF_F_NO_PREALLOC (uapi/linux/bpf.h): entries are allocated as pods come, and tries require it.
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


# whether programs may ask which process calls them
_CALLER = "#define CALLER\n"

# loaded by whoever traces, beside the others' maps: hook → its raw tracepoint
DEATH_SOURCES = ("maps.h", "address.h", "reading.h", "events.c", "deaths.c")


def sources_digest() -> bytes:
    """SHA-256 of everything that decides what the programs are: the 32 bytes kept in the `build` map."""
    digest = hashlib.sha256(PROLOGUE.encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    digest.update(repr(HOOKS).encode())
    return digest.digest()


def compile_and_pin(maps: Path, programs: Path) -> None:
    """Compile in a child; reuse the maps pinned under `maps`, create the missing ones, pin programs in `programs`.

    Raises CompileFailed with the compiler's or verifier's own words.
    """
    child = _run("all", maps, programs)
    if child.returncode != 0:
        words = "\n".join(child.stderr.strip().splitlines()[-_LINES_SHOWN:])
        raise CompileFailed(f"the BPF programs in {HERE} do not load on this kernel:\n{words}")


def compile_deaths(maps: Path, programs: Path) -> None:
    """The same for the programs that see processes end. Raises CompileFailed, one line."""
    child = _run("deaths", maps, programs)
    if child.returncode != 0:
        raise CompileFailed(_last_words(child))


@dataclass(frozen=True)
class Refused:
    """What a kernel does not take of ours: name → why; NOT_PERMITTED if it is this process that may not."""

    maps: dict[str, str]  # programs are not tried without all of them
    programs: dict[str, str]  # by hook; the verifier's last line


def try_each(scratch: Path) -> Refused:
    """Compile in a child, make every map and load every program by itself; nothing is attached.

    What a kernel may lack is left out. `scratch` is an empty directory on a bpffs for the maps, which are left there.
    Raises CompileFailed.
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
    """The line with the error, which bcc ends with one that only says that there was one."""
    lines = child.stderr.strip().splitlines()
    errors = [line for line in lines if "error: " in line]
    return " ".join((errors or lines)[-1:]) or "the compiler ended without a word"


def _compiled(maps: Path, sources: tuple[str, ...], offsets: str) -> Any:
    parts = [f'#define SIDESTEP_MAPS "{maps}"\n', offsets, PROLOGUE]
    for name in sources:
        parts.append(f'#line 1 "bpf/{name}"\n{(HERE / name).read_text()}\n')
    os.environ["BCC_KERNEL_SOURCE"] = str(HERE / "uapi")
    from bcc import BPF  # the only import of bcc: see the module's docstring

    return BPF(text="".join(parts), cflags=["-Wno-macro-redefined"])


def _acceleration() -> str:
    """What the programs of acceleration need of this kernel; without it they are left out."""
    try:
        return f"#define ACCELERATION\n{definitions()}"
    except NoOffsets:
        return ""


def _load(unit: Any, hook: Hook) -> Any:
    return unit.load_func(hook.function, hook.program_type, None, hook.attach_type)


def _main_all(maps: Path, programs: Path) -> None:
    unit, loaded = _loaded(maps)
    for hook, program in loaded.items():
        syscalls.pin(program.fd, programs / hook.name)
    with suppress(Exception):  # bcc raises nothing narrower; without it the node's level is off, and capture works
        syscalls.pin(_load(unit, MESSAGE_HOOK).fd, programs / MESSAGE_HOOK.name)
    # last: from here on pods are enrolled with it
    with Descriptor(syscalls.open_pin(maps / "steering")) as steering:
        keep(steering.fd, unit.dump_func(NETNS_HOOK.function), _name_of_map)


def _name_of_map(fd: int) -> str:
    return str(syscalls.map_info(fd).name.decode())


def _loaded(maps: Path) -> tuple[Any, dict[Hook, Any]]:
    """All that captures. What a kernel refuses of acceleration, or of naming callers, it captures without."""
    *better, plainest = dict.fromkeys((_CALLER + _acceleration(), _acceleration(), _CALLER, ""))
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
    """The lines that are written to stderr meanwhile, which is all that libbcc tells; they are there afterwards."""
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
    except Exception as error:  # bcc raises nothing narrower; the compiler's and verifier's words are on stderr already
        sys.exit(str(error))
