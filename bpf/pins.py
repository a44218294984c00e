"""Where maps, programs and links are pinned on the bpffs.

    <bpffs>/sidestep/<layout>/maps/<name>       the maps of maps.h
                             /programs/<name>   the loaded programs
                             /links/<name>      the links of the cgroup programs, for all pods together
                             /netns/<cookie>    one link of its own program (steering.py) per enrolled pod
                             /shapes/<name>     what a map holds (shapes.py): a symbolic link to digests

The layout is v and a digest of the maps' shapes. Programs of one layout replace each other in place; pods of another
layout are taken over (takeover.py).
"""

import ctypes
import errno
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bpf import syscalls
from bpf.bpffs import FOLDER, require_pins_on, where_else
from bpf.errors import KernelRefused, NotAttached
from bpf.layout import STORAGES, TABLES
from bpf.shapes import layout_of_maps
from bpf.syscalls import Descriptor

LAYOUT = layout_of_maps()
_SOCKET_BYTES = 4  # key of a socket storage: a socket's descriptor

# Read-only commands must not advise `sidestep detach`, because it ends the capture of every pod.
_ITS_OWN = (
    "another version of sidestep is attached: use that version's command, in its agent's container "
    "(kubectl exec -n istio-system AGENT -- sidestep …)"
)


class OtherVersion(NotAttached):
    """The pinned maps were made by another version of sidestep and have other shapes."""


@dataclass(frozen=True)
class Pins:
    """The directories of one installation below a bpffs mount. They are kept, because every ADD asks for many."""

    bpffs: Path
    is_read_only: bool = False  # whether maps are opened for reading only

    @cached_property
    def top(self) -> Path:
        """The directory with all layouts."""
        return self.bpffs / FOLDER

    @cached_property
    def root(self) -> Path:
        """The directory of this version's layout."""
        return self.top / LAYOUT

    @cached_property
    def maps(self) -> Path:
        """Pinned maps."""
        return self.root / "maps"

    @cached_property
    def programs(self) -> Path:
        """Pinned programs."""
        return self.root / "programs"

    @cached_property
    def links(self) -> Path:
        """Pinned cgroup links."""
        return self.root / "links"

    @cached_property
    def places(self) -> Path:
        """Pinned cgroup links at further cgroups, a directory for each; see places.py."""
        return self.root / "places"

    @cached_property
    def netns(self) -> Path:
        """Pinned per-pod links."""
        return self.root / "netns"

    def make_directories(self) -> None:
        """Make those directories that do not exist, with access for root alone."""
        for directory in (self.top, self.root, self.maps, self.programs, self.links, self.netns):
            directory.mkdir(mode=0o700, exist_ok=True)

    def look_only(self) -> "Pins":
        """The same pins for commands that change nothing: maps are opened for reading only."""
        return replace(self, is_read_only=True)

    def require_attached(self) -> None:
        """Raise KernelRefused if there is no bpffs, OtherVersion or NotAttached if the maps are not pinned."""
        require_pins_on(self.bpffs)
        if self.maps.is_dir():
            return
        # a layout with "-" in its name is what is left of a version that is not attached any more (takeover.py)
        if others := sorted(path.name for path in self.top.glob("v*") if path != self.root and "-" not in path.name):
            raise OtherVersion(f"{self.top} has the pins of layout {', '.join(others)}, not {LAYOUT}; {_ITS_OWN}")
        raise NotAttached(f"nothing is attached: --bpffs {self.bpffs} has no {self.root}; {where_else(self.bpffs)}")

    def has_values(self, name: str, size: int) -> bool:
        """Whether a map's values have `size` bytes. Raises KernelRefused."""
        with Descriptor(syscalls.open_pin(self.maps / name)) as opened:
            return bool(syscalls.map_info(opened.fd).value_size == size)

    def open_map(self, name: str) -> int:
        """A descriptor of a map; the caller closes it.

        Raises OtherVersion if the sizes of key and value differ from layout.py's, NotAttached if the map is not pinned,
        KernelRefused if it cannot be opened.
        """
        try:
            fd = syscalls.open_pin(self.maps / name, syscalls.READ_ONLY if self.is_read_only else 0)
        except KernelRefused as refused:
            if refused.errno != errno.ENOENT:
                raise
            self.require_attached()
            raise NotAttached(
                f"{self.maps / name} is not there; run `sidestep attach` (or start the agent)"
            ) from refused
        info = syscalls.map_info(fd)
        wanted = _sizes_of(name)
        if (info.key_size, info.value_size) != wanted:
            os.close(fd)
            raise OtherVersion(
                f"{self.maps / name} has key and value of {(info.key_size, info.value_size)} bytes, this version has "
                f"{wanted}; {_ITS_OWN}"
            )
        return fd


def _sizes_of(name: str) -> tuple[int, int]:
    """The bytes of a map's key and value, as layout.py has them."""
    if name in STORAGES:
        return _SOCKET_BYTES, STORAGES[name]
    key, value = TABLES[name]
    return ctypes.sizeof(key), ctypes.sizeof(value)
