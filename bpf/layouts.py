"""The layouts that are pinned on a bpffs, this version's and others', by names alone.

Other versions have other maps and structs, but every version keeps the links of its pods as `netns/<cookie>` and those
of its cgroup programs as `links/<hook>` and `places/<cgroup>/<hook>` (places.py).
"""

from pathlib import Path

from bpf.links import linked_in
from bpf.pins import Pins


def layouts(pins: Pins) -> list[Path]:
    """The directory of each layout, in the order of their names."""
    return sorted(path for path in pins.top.glob("v*") if path.is_dir())


def other_layouts(pins: Pins) -> list[Path]:
    """The directories of the layouts that are not this version's."""
    return [path for path in layouts(pins) if path != pins.root]


def steered(layout: Path) -> dict[int, int]:
    """The pods that a layout steers now: netns cookie → inode of the namespace."""
    return {cookie: inode for cookie, inode in linked_in((layout / "netns").glob("*")) if inode}
