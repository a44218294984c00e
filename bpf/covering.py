"""Attaches the programs where pods are: at the chosen cgroups at first, and later wherever a pod turns up.

A cgroup is covered if the programs are attached at it or above it, as the kernel says now. Records do not count.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bpf import takeover
from bpf.attachment import Outcome, attach_also, attach_programs, attached_cgroups, cgroup_of_link, places_of
from bpf.errors import KernelRefused, NotAttached
from bpf.hooks import DECIDING
from bpf.kernel import cgroup2_root
from bpf.pins import Pins
from bpf.places import link_directories_of
from bpf.trees import Choice, has_processes, place_for


def attach_where_pods_are(pins: Pins, choice: Choice) -> Outcome:
    """Attach the programs of this source tree at the chosen cgroups, doing as little as possible.

    Cgroups where the programs are attached already keep them as long as processes are there: capture of running pods
    does not end because pods are elsewhere too. If the settings give the cgroup, the first place moves there all the
    same. Raises what attach_programs() raises.
    """
    beside = _places_of_others(pins, choice)
    outcome = attach_programs(pins, _first(pins, choice, beside))
    added = [place for place in (*choice.every, *beside) if place.is_dir() and attach_also(pins, place)]
    return Outcome.EXTENDED if added and outcome is Outcome.UNCHANGED else outcome


def covering(pins: Pins, root: Path, cgroup: Path) -> Path | None:
    """The cgroup, this one or one above it, at which the programs that decide are attached; None if there is none.

    `root` is where cgroup2 is mounted. A cgroup that is not there is covered if one above it is: it gets the programs
    when it is made.
    """
    attached = attached_cgroups(pins, DECIDING)
    way = (each for each in (cgroup, *cgroup.parents) if each.is_relative_to(root))
    return next((each for each in way if _id_of(each) in attached), None)


def is_covered(pins: Pins, root: Path, cgroup: Path) -> bool:
    """Whether there is such a cgroup."""
    return covering(pins, root, cgroup) is not None


def cover(pins: Pins, cgroup: Path) -> bool:
    """Attach where the pod is whose processes are in `cgroup`. False if it is covered already.

    Raises KernelRefused that says why nothing can be attached there; NotAttached if nothing is attached anywhere.
    """
    if is_covered(pins, cgroup2_root(), cgroup):
        return False
    place = place_for(cgroup)
    if place is None:
        raise KernelRefused(f"{cgroup} is the root of cgroup2, where nothing is attached unless --cgroup says so")
    if not place.is_dir():
        raise KernelRefused(f"{place} does not exist")
    return attach_also(pins, place)


def _first(pins: Pins, choice: Choice, beside: list[Path]) -> Path:
    """The cgroup to attach at before others: where the programs are, if pods are there too."""
    if choice.is_given:
        return choice.first
    try:
        before, *further = places_of(pins)
    except NotAttached:
        before, further = choice.first, []
    stays = before in choice.every or (before != cgroup2_root() and before.is_dir() and has_processes(before))
    wanted = before if stays else choice.first
    return next((place for place in (*further, *beside) if wanted.is_relative_to(place)), wanted)


def _places_of_others(pins: Pins, choice: Choice) -> list[Path]:
    """Where other layouts' programs are attached and processes are, so that their pods can be taken over there.

    A first place is left out if the settings give another, and the root always.
    """
    ids = set(_cgroups_of_others(pins, choice))
    if not ids:
        return []
    root = cgroup2_root()
    every = (Path(each) for each, _, _ in os.walk(root))
    return [each for each in every if each != root and _id_of(each) in ids and has_processes(each)]


def _cgroups_of_others(pins: Pins, choice: Choice) -> Iterator[int]:
    for other in takeover.attached_others(pins):
        first, *further = link_directories_of(other)
        for directory in further if choice.is_given else (first, *further):
            yield from (cgroup_of_link(directory / name) for name in DECIDING)


def _id_of(cgroup: Path) -> int:
    """A cgroup's id, which is its directory's inode; 0 if it is not there."""
    with suppress(OSError):
        return cgroup.stat().st_ino
    return 0
