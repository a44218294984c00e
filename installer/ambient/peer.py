"""Which process is at the other end of ztunnel's socket: its container is the one that opens ztunnel's sockets."""

import os
import re
import socket
import struct
from pathlib import Path

from bpf.errors import SidestepError
from bpf.syscalls import Descriptor
from cni.netns.pidfd import sees_nodes_pids

_UCRED = struct.Struct("3i")
_SO_PEERPIDFD = 77  # uapi/asm-generic/socket.h, Linux 6.5
_PID = re.compile(r"^Pid:\s*(\d+)$", re.MULTILINE)


class PeerUnknown(SidestepError):
    """The process can't be told by the numbers that the node's procfs has."""


def pid_of(peer: socket.socket, proc: Path) -> int:
    """The id of the process that has connected, as `proc` has it, a procfs of the node. Raises PeerUnknown."""
    try:
        if sees_nodes_pids(proc):
            return int(_UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
        # the agent's container has process ids of its own; procfs tells of a descriptor in the ids that it has itself
        raw = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        with Descriptor(struct.unpack("=i", raw)[0]) as process:
            found = _PID.search((proc / f"self/fdinfo/{process.fd}").read_text())
    except OSError as error:
        raise PeerUnknown(
            f"the process at ztunnel's socket can't be looked at: {os.strerror(error.errno or 0)}; set hostPID: true "
            "for the agent, which needs Linux 6.5 without it"
        ) from error
    if found is None or found[1] == "0":
        raise PeerUnknown("the process at ztunnel's socket has ended already")
    return int(found[1])
