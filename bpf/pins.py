"""Where things are pinned on the bpffs.

    <bpffs>/sidestep/v1/maps/<name>       the tables of maps.h
                       /programs/<name>   the loaded programs, of which sk_lookup is linked per pod
                       /links/<name>      the global cgroup links
                       /netns/<cookie>    one sk_lookup link per enrolled pod

v1 is the layout: it changes when an old pinned map can't serve new programs.
"""

import ctypes
import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused, NotAttached
from bpf.kernel import require_bpffs
from bpf.layout import TABLES
from bpf.syscalls import Descriptor

LAYOUT = "v1"

# whoever only looks must not be told to detach: that would end the capture of every pod
_ITS_OWN = (
    "another version of sidestep is attached: use the command of that one, in its agent's container "
    "(kubectl exec -n istio-system AGENT -- sidestep …)"
)


class OtherVersion(NotAttached):
    """What is pinned was made by a version whose maps have other shapes."""


@dataclass(frozen=True)
class Pins:
    """The directories of one installation below a bpffs mount."""

    bpffs: Path
    is_read_only: bool = False  # how maps are opened

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

    def look_only(self) -> "Pins":
        """The same, from which maps are opened for reading alone: all that is needed where nothing is to be changed."""
        return replace(self, is_read_only=True)

    def require_attached(self) -> None:
        """Raise KernelRefused without a bpffs, NotAttached without pins: what every look at the maps needs."""
        require_bpffs(self.bpffs)
        if self.maps.is_dir():
            return
        if others := sorted(path.name for path in self.top.glob("v*") if path != self.root):
            raise OtherVersion(f"{self.top} has the pins of layout {', '.join(others)}, not {LAYOUT}; {_ITS_OWN}")
        raise NotAttached(
            f"nothing is attached: {self.root} is not there; run `sidestep attach` (or start the agent), or give the "
            "--bpffs that was attached with"
        )

    def has_values(self, name: str, size: int) -> bool:
        """Whether a map's values have so many bytes. Raises KernelRefused."""
        with Descriptor(syscalls.open_pin(self.maps / name)) as opened:
            return bool(syscalls.map_info(opened.fd).value_size == size)

    def open_map(self, name: str) -> int:
        """A descriptor of a table, its shape checked against layout.py. Raises NotAttached, OtherVersion."""
        try:
            fd = syscalls.open_pin(self.maps / name, syscalls.READ_ONLY if self.is_read_only else 0)
        except KernelRefused as refused:
            if refused.errno != errno.ENOENT:
                raise
            self.require_attached()
            raise NotAttached(
                f"{self.maps / name} is not there; run `sidestep attach` (or start the agent)"
            ) from refused
        key, value = TABLES[name]
        info = syscalls.map_info(fd)
        wanted = (ctypes.sizeof(key), ctypes.sizeof(value))
        if (info.key_size, info.value_size) != wanted:
            os.close(fd)
            raise OtherVersion(
                f"{self.maps / name} has key and value of {(info.key_size, info.value_size)} bytes, this version has "
                f"{wanted}; {_ITS_OWN}"
            )
        return fd
