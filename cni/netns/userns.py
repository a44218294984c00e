"""Translates a pod's user and group ids into those that the BPF programs see.

A pod with `hostUsers: false` has its own user namespace: its proxy's id 1337 is another id outside. The kernel reads
the ids in Istio's rules in the user namespace that owns the network namespace, so ids are translated from there.
"""

import fcntl
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from bpf.syscalls import Descriptor
from cni.errors import SandboxInvalid

_NS_GET_USERNS = 0xB701  # uapi/linux/nsfs.h


class _Extent(NamedTuple):
    """One line of a uid_map or gid_map (user_namespaces(7))."""

    inside: int
    outside: int
    length: int


def outside_ids(netns_fd: int, uid: int, gid: int) -> tuple[int, int]:
    """A pod's uid and gid in the initial user namespace. Raises SandboxInvalid if one of them is not mapped.

    `netns_fd` is a descriptor of the pod's network namespace.
    """
    try:
        owner = fcntl.ioctl(netns_fd, _NS_GET_USERNS)
    except OSError as error:
        raise SandboxInvalid(f"cannot find the user namespace of CNI_NETNS: {error.strerror}") from error
    with Descriptor(owner):
        if os.path.samestat(os.fstat(owner), Path("/proc/self/ns/user").stat()):
            return uid, gid
        uids, gids = _maps_of(owner)
    return _outside("uid", uid, uids), _outside("gid", gid, gids)


def _maps_of(userns_fd: int) -> tuple[list[_Extent], list[_Extent]]:
    """The uid map and the gid map of a user namespace, which may have no process yet.

    A child process enters the namespace, because a thread of ours cannot. Its maps are read from outside, so their
    outer ids are those of our own user namespace.
    """
    argv = ["nsenter", f"--user=/proc/self/fd/{userns_fd}", "--preserve-credentials", "cat"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[userns_fd]
    ) as visitor:
        assert visitor.stdin is not None and visitor.stdout is not None and visitor.stderr is not None
        visitor.stdin.write(b".")
        visitor.stdin.flush()
        if visitor.stdout.read(1) != b".":  # once cat answers, nsenter has entered the namespace
            words = visitor.stderr.read().decode(errors="replace").strip()
            raise SandboxInvalid(f"cannot enter the user namespace of CNI_NETNS: {words}")
        process = Path("/proc") / str(visitor.pid)
        maps = _extents(process / "uid_map"), _extents(process / "gid_map")
        visitor.stdin.close()
    return maps


def _extents(path: Path) -> list[_Extent]:
    return [_Extent(*map(int, line.split())) for line in path.read_text().splitlines()]


def _outside(kind: str, value: int, extents: list[_Extent]) -> int:
    for extent in extents:
        if extent.inside <= value < extent.inside + extent.length:
            return extent.outside + value - extent.inside
    raise SandboxInvalid(f"the proxy's {kind} {value} does not exist in the pod's user namespace")
