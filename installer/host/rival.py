"""istio-cni's agent on the same node. If it runs, sidestep stands by.

Each of the two would put its plugin into the chain and take the other's out, for ever. With both plugins in the chain,
pods would be captured twice. istio-cni's agent knows nothing of sidestep, so sidestep gives way: it leaves the chain
until that agent has gone.
"""

import ctypes
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bpf.kernel import node_root
from bpf.syscalls import Descriptor
from installer.host.chain import Document

# where istio-cni's agent listens for its plugin's log lines, in the run directory that its chain entry names
# (cni/pkg/constants of Istio)
_RUN_DIR, _SOCKET = "/var/run/istio-cni", "log.sock"
_SECONDS = 1.0
# openat2(2) has this number on all architectures; the flag takes symbolic links as a process with that root would
# (uapi/linux/openat2.h)
_OPENAT2, _RESOLVE_IN_ROOT = 437, 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    """struct open_how."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def serving_rival(entries: Iterable[Document], proc: Path) -> bool:
    """Whether the agent behind one of istio-cni's chain entries runs on this node. `proc` is a procfs of the node.

    An entry alone does not say so: an agent that was killed leaves it behind.
    """
    # without the right to look into the first process, its root may still be this process's own
    roots = (proc / "1/root", node_root())
    return any(_listens_in(root, _run_dir(each)) for each in entries for root in roots)


def in_the_way(file: str) -> str:
    """A sentence about istio-cni's entry in this file while its agent runs."""
    return (
        f"istio-cni's agent runs on this node and has its plugin in {file}, so sidestep leaves the chain to it; remove "
        "istio-cni, or give its DaemonSet sidestep's image (docs/migration.md)"
    )


def _run_dir(entry: Document) -> str:
    named = entry.get("cni_agent_run_dir")
    return named if isinstance(named, str) and named else _RUN_DIR


def _listens_in(root: Path, run_dir: str) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_SECONDS)
        with Descriptor(_open_within(root, run_dir)) as directory:
            asking.connect(f"/proc/self/fd/{directory.fd}/{_SOCKET}")  # a socket's path has at most 107 bytes
            return True
    return False


def _open_within(root: Path, directory: str) -> int:
    """An O_PATH descriptor of the directory that processes with this root call so. Raises OSError.

    On most nodes /var/run is a link to /run, which would lead into this process's own root.
    """
    kind = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    how = _How(kind, 0, _RESOLVE_IN_ROOT)
    with Descriptor(os.open(root, kind)) as top:
        arguments = (
            ctypes.c_int(top.fd),
            os.fsencode(directory),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        found = int(_LIBC.syscall(ctypes.c_long(_OPENAT2), *arguments))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), directory)
    return found
