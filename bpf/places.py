"""Further cgroups that the programs are attached at, because pods turned out to be there.

The first cgroup is recorded in the map `build`, and its links are in `links`. A further one needs no record: its links
are in `places`, in a directory that is named by the cgroup's path below the mount of cgroup2. No place is below
another, as the programs of both would run and count each connection twice.
"""

from pathlib import Path
from urllib.parse import quote, unquote

from bpf.errors import KernelRefused
from bpf.kernel import cgroup2_root
from bpf.pins import Pins

_LONGEST_NAME = 255  # bytes of a file's name on a bpffs


def further_places(pins: Pins) -> dict[Path, Path]:
    """Every further cgroup, also one that has gone, with the directory of its links' pins. Raises KernelRefused."""
    if not pins.places.is_dir():
        return {}
    root = cgroup2_root()
    return {root / unquote(each.name): each for each in sorted(pins.places.iterdir())}


def pins_of_place(pins: Pins, cgroup: Path) -> Path:
    """The directory for the pins of a further cgroup's links. Raises KernelRefused if its name would be too long."""
    # a bpffs takes no name with a dot
    name = quote(str(cgroup.relative_to(cgroup2_root())), safe="").replace(".", "%2E")
    if len(name) > _LONGEST_NAME:
        raise KernelRefused(f"cgroup {cgroup}: its path is too long to attach there; attach at a cgroup above it")
    return pins.places / name


def link_directories(pins: Pins) -> list[Path]:
    """The directories with pins of cgroup links: of the first place, then of further ones."""
    return link_directories_of(pins.root)


def link_directories_of(layout: Path) -> list[Path]:
    """The same in the directory of any version's layout."""
    return [layout / "links", *sorted((layout / "places").glob("*"))]


def named(pins: Pins, path: Path) -> str:
    """What people are told of a pin: "links/connect4", of a further cgroup's links "places/kubepods.slice/connect4"."""
    if path.parent.parent == pins.places:
        return f"places/{unquote(path.parent.name)}/{path.name}"
    return f"{path.parent.name}/{path.name}"
