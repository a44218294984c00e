"""Descriptors of everything that is pinned, so that lost pins end no capture: an object lives while it is open.

A process that keeps them can pin the objects again after somebody has removed the pins or has unmounted the bpffs.
A link that was detached is dead for all that have it open. It is let go, and attach_programs() has to make another.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

from bpf import syscalls
from bpf.acceleration import is_possible
from bpf.errors import KernelRefused
from bpf.hooks import CGROUP_HOOKS, HOOKS, MESSAGE_HOOK
from bpf.kernel import has_mount, mount_bpffs
from bpf.layout import STORAGES, TABLES
from bpf.pins import Pins
from bpf.places import further_places, link_directories, named
from bpf.syscalls import Descriptor
from bpf.takeover import note_shapes

# Not retained: without its pin, the next attach makes new programs (unpin_others() in attachment.py relies on that).
_LEFT_OUT = "build"


class Retained:
    """The maps, programs and cgroup links of one installation. Safe to use from many threads."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}  # pin → descriptor of what was pinned there
        self.look()

    def look(self) -> None:
        """Retain what is pinned now in the place of what was: programs may have been swapped, or links moved."""
        with self._lock:
            for path in _paths(self._pins):
                with suppress(KernelRefused):
                    opened = syscalls.open_pin(path)
                    self._let_go(path)
                    self._open[path] = opened

    def restore(self) -> list[str]:
        """Mount the bpffs and pin what is retained, as far as it is gone. Returns what came back: "bpffs", "links/…".

        Raises KernelRefused.
        """
        restored = []
        if not has_mount(self._pins.bpffs, "bpf"):
            mount_bpffs(self._pins.bpffs)
            restored.append("bpffs")
        with self._lock:
            missing = [path for path in self._open if not path.exists()]
            if missing:
                self._pins.make_directories()
                note_shapes(self._pins.root)
            for path in missing:
                if _is_link(path, self._pins) and not syscalls.link_info(self._open[path]).cgroup_id:
                    self._let_go(path)
                    continue
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                syscalls.pin(self._open[path], path)
                restored.append(named(self._pins, path))
        return restored

    def close(self) -> None:
        """Close every descriptor. What is pinned stays."""
        with self._lock:
            for path in list(self._open):
                self._let_go(path)

    def __enter__(self) -> "Retained":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _let_go(self, path: Path) -> None:
        if (before := self._open.pop(path, None)) is not None:
            os.close(before)


def missing_pins(pins: Pins) -> list[str]:
    """What is not pinned or, of links, attached to nothing: "maps/…", "programs/…", "links/…", "places/…".

    The links of a further cgroup that has gone are not missing.
    """
    gone = [directory for place, directory in further_places(pins).items() if not place.is_dir()]
    wanted = [path for path in _paths(pins) if path.name != MESSAGE_HOOK.name or is_possible(pins)]
    missing = [path for path in wanted if not path.exists() or _is_dead(path, pins)]
    return [named(pins, path) for path in missing if path.parent not in gone]


def _is_dead(path: Path, pins: Pins) -> bool:
    if not _is_link(path, pins):
        return False
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(path)) as link:
        return not syscalls.link_info(link.fd).cgroup_id
    return True


def _paths(pins: Pins) -> list[Path]:
    return [
        *(pins.maps / name for name in (*TABLES, *STORAGES) if name != _LEFT_OUT),
        *(pins.programs / hook.name for hook in (*HOOKS, MESSAGE_HOOK)),
        *(directory / hook.name for directory in link_directories(pins) for hook in CGROUP_HOOKS),
    ]


def _is_link(path: Path, pins: Pins) -> bool:
    return path.parent not in (pins.maps, pins.programs)
