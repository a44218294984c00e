"""BCC in a child process: the program sources become loaded programs and maps, pinned; the child's memory goes with it.

Only this module imports bcc, and only in the child (`python -m bpf.compiler MAPS PROGRAMS`): once it has compiled,
LLVM stays resident at some 120 MiB. The sources are joined as text into one unit because BCC makes programs only of
functions in its main file; `#line` keeps the compiler's messages pointing at ours.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.errors import CompileFailed
from bpf.offsets import NoOffsets, definitions

HERE = Path(__file__).parent
_LINES_SHOWN = 40  # of a verifier's log, whose end says why

# one unit, in this order: tables, then pure headers, then what builds on them
SOURCES = (
    "maps.h",
    "address.h",
    "policy.h",
    "sockaddr.c",
    "owner.c",
    "facts.c",
    "events.c",
    "connect.c",
    "datagram.c",
    "bind.c",
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


@dataclass(frozen=True)
class Hook:
    """One program: its function, the pin's name, and the kernel's numbers for its type (uapi/linux/bpf.h)."""

    name: str
    program_type: int
    attach_type: int

    @property
    def function(self) -> str:
        """The C function's name, which bpftool shows; the kernel keeps 15 characters."""
        return f"ss_{self.name}"


CGROUP_SOCK, SOCK_OPS, SK_MSG, CGROUP_SOCK_ADDR, CGROUP_SOCKOPT, SK_LOOKUP = 9, 13, 16, 18, 25, 30

CGROUP_HOOKS = (
    Hook("sock_create", CGROUP_SOCK, 2),
    Hook("connect4", CGROUP_SOCK_ADDR, 10),
    Hook("connect6", CGROUP_SOCK_ADDR, 11),
    Hook("post_bind4", CGROUP_SOCK, 12),
    Hook("post_bind6", CGROUP_SOCK, 13),
    Hook("sendmsg4", CGROUP_SOCK_ADDR, 14),
    Hook("sendmsg6", CGROUP_SOCK_ADDR, 15),
    Hook("recvmsg4", CGROUP_SOCK_ADDR, 19),
    Hook("recvmsg6", CGROUP_SOCK_ADDR, 20),
    Hook("getpeername4", CGROUP_SOCK_ADDR, 29),
    Hook("getpeername6", CGROUP_SOCK_ADDR, 30),
    Hook("sockops", SOCK_OPS, 3),
    Hook("getsockopt", CGROUP_SOCKOPT, 21),
)
NETNS_HOOK = Hook("sk_lookup", SK_LOOKUP, 36)
HOOKS = (*CGROUP_HOOKS, NETNS_HOOK)
# there only where the kernel allows acceleration (offsets.py); attached to the socket hash by acceleration.py
MESSAGE_HOOK = Hook("message", SK_MSG, 7)


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
    child = subprocess.run(
        [sys.executable, "-m", "bpf.compiler", str(maps), str(programs)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode != 0:
        words = "\n".join(child.stderr.strip().splitlines()[-_LINES_SHOWN:])
        raise CompileFailed(f"the BPF programs in {HERE} do not load on this kernel:\n{words}")


def try_each(scratch: Path) -> dict[str, str]:
    """Compile in a child and load every program by itself: hook → why the kernel refuses it, empty when it doesn't.

    `scratch` is an empty directory on a bpffs for the maps, which are left there. Raises CompileFailed.
    """
    child = subprocess.run(
        [sys.executable, "-m", "bpf.compiler", str(scratch)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode != 0:
        raise CompileFailed(" ".join(child.stderr.strip().splitlines()[-1:]) or "the compiler ended without a word")
    outcome: dict[str, str] = json.loads(child.stdout)
    return outcome


def _unit(maps: Path) -> str:
    parts = [f'#define SIDESTEP_MAPS "{maps}"\n', _acceleration(), PROLOGUE]
    for name in SOURCES:
        parts.append(f'#line 1 "bpf/{name}"\n{(HERE / name).read_text()}\n')
    return "".join(parts)


def _acceleration() -> str:
    """What the programs of acceleration need of this kernel; without it they are left out."""
    try:
        return f"#define ACCELERATION\n{definitions()}"
    except NoOffsets:
        return ""


def _compiled(maps: Path) -> Any:
    os.environ["BCC_KERNEL_SOURCE"] = str(HERE / "uapi")
    from bcc import BPF  # the only import of bcc: see the module's docstring

    return BPF(text=_unit(maps), cflags=["-Wno-macro-redefined"])


def _main(maps: Path, programs: Path) -> None:
    unit = _compiled(maps)
    for hook in HOOKS:
        loaded = unit.load_func(hook.function, hook.program_type, None, hook.attach_type)
        syscalls.pin(loaded.fd, programs / hook.name)
    with suppress(Exception):  # bcc raises nothing narrower; without it the node's level is off, and capture works
        loaded = unit.load_func(MESSAGE_HOOK.function, MESSAGE_HOOK.program_type, None, MESSAGE_HOOK.attach_type)
        syscalls.pin(loaded.fd, programs / MESSAGE_HOOK.name)


def _main_each(maps: Path) -> None:
    unit = _compiled(maps)
    outcome = {}
    for hook in HOOKS:
        try:
            unit.load_func(hook.function, hook.program_type, None, hook.attach_type)
            outcome[hook.name] = ""
        except Exception as error:  # bcc raises nothing narrower
            outcome[hook.name] = str(error)
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    try:
        if len(sys.argv) == 2:
            _main_each(Path(sys.argv[1]))
        else:
            _main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # bcc raises nothing narrower; the compiler's and verifier's words are on stderr already
        sys.exit(str(error))
