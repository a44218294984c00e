"""Finds pods' network namespaces again: they are not held, and after a restart of the agent nothing is known of them.

A namespace exists as long as something refers to it. What a pod's has are its processes, and the bind mount that the
runtime keeps (of type nsfs) where that can be seen from here.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from bpf.pins import Descriptor
from cni.errors import SandboxInvalid
from cni.sandbox import own_cookie, visit


def find(cookies: Collection[int], proc: Path = Path("/proc")) -> Iterator[tuple[int, int]]:
    """(cookie, descriptor) of each namespace that is wanted and found, closed when the next is asked for.

    `proc` is where the processes of the whole node are to be seen. What vanishes meanwhile is left out.
    """
    wanted = set(cookies)
    seen = {Path("/proc/self/ns/net").stat().st_ino}
    for path in _candidates(proc) if wanted else ():
        try:
            inode = path.stat().st_ino
            if inode in seen:
                continue
            seen.add(inode)
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        with Descriptor(opened) as netns, suppress(SandboxInvalid):
            cookie = visit(netns.fd, lambda _: own_cookie())
            if cookie in wanted:
                wanted.discard(cookie)
                yield cookie, netns.fd
        if not wanted:
            return


def _candidates(proc: Path) -> Iterator[Path]:
    """Everything that may be a network namespace: mounts first, which are few."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[3].startswith("net:[") and "nsfs" in fields:
            yield Path(fields[4])
    for entry in os.scandir(proc):
        if entry.name.isdecimal():
            yield Path(entry.path) / "ns" / "net"
