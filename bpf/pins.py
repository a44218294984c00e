"""Where things are pinned on the bpffs, and descriptors that close themselves.

    <bpffs>/sidestep/v1/maps/<name>       the tables of maps.h
                       /programs/<name>   the loaded programs, of which sk_lookup is linked per pod
                       /links/<name>      the global cgroup links
                       /netns/<cookie>    one sk_lookup link per enrolled pod

v1 is the layout: it changes when an old pinned map can't serve new programs.
"""

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused, NotAttached
from bpf.kernel import require_bpffs
from bpf.layout import TABLES

LAYOUT = "v1"


class Descriptor:
    """An owned file descriptor: `with Descriptor(fd) as d: … d.fd …`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it; once."""
        os.close(self.fd)

    def __enter__(self) -> "Descriptor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Pins:
    """The directories of one installation below a bpffs mount."""

    bpffs: Path

    @property
    def top(self) -> Path:
        """All layouts."""
        return self.bpffs / "sidestep"

    @property
    def root(self) -> Path:
        """The current layout."""
        return self.top / LAYOUT

    @property
    def maps(self) -> Path:
        """Pinned tables."""
        return self.root / "maps"

    @property
    def programs(self) -> Path:
        """Pinned programs."""
        return self.root / "programs"

    @property
    def links(self) -> Path:
        """Pinned cgroup links."""
        return self.root / "links"

    @property
    def netns(self) -> Path:
        """Pinned per-pod links."""
        return self.root / "netns"

    def make_directories(self) -> None:
        """All of them, for root alone; those that are there stay."""
        for directory in (self.top, self.root, self.maps, self.programs, self.links, self.netns):
            directory.mkdir(mode=0o700, exist_ok=True)

    def open_map(self, name: str) -> int:
        """A descriptor of a table, its shape checked against layout.py. Raises NotAttached."""
        try:
            fd = syscalls.open_pin(self.maps / name)
        except KernelRefused as refused:
            if getattr(refused, "errno", 0) != errno.ENOENT:
                raise
            require_bpffs(self.bpffs)
            raise NotAttached(
                f"{self.maps / name} is not there; run `sidestep attach` (or start the agent)"
            ) from refused
        key, value = TABLES[name]
        info = syscalls.map_info(fd)
        wanted = (ctypes.sizeof(key), ctypes.sizeof(value))
        if (info.key_size, info.value_size) != wanted:
            os.close(fd)
            raise NotAttached(
                f"{self.maps / name} has key and value of {(info.key_size, info.value_size)} bytes, this version "
                f"writes {wanted}; run `sidestep detach` and start again"
            )
        return fd
