"""Tells a command that runs for long whether the maps that it has open are still those of the attached programs."""

import errno
from enum import Enum
from typing import Any

from bpf import syscalls
from bpf.errors import KernelRefused, NotAttached
from bpf.pins import OtherVersion, Pins
from bpf.syscalls import Descriptor
from bpf.tables import Table


class Pinned(Enum):
    """What is pinned now, compared with a map that was opened before."""

    SAME = "the same map"
    ANOTHER = "another map: the programs were detached and attached again"
    NOTHING = "nothing: the programs are detached, or somebody removed all pins"


def pinned_now(pins: Pins, table: Table[Any, Any]) -> Pinned:
    """Compare a map with its pin. Raises OtherVersion if another version has taken the pods over, KernelRefused.

    If the pin alone is missing, the map counts as the same: the agent puts such a pin back.
    """
    try:
        with Descriptor(syscalls.open_pin(pins.maps / table.name, syscalls.READ_ONLY)) as now:
            is_same = syscalls.map_info(now.fd).id == syscalls.map_info(table.descriptor).id
            return Pinned.SAME if is_same else Pinned.ANOTHER
    except KernelRefused as refused:
        if refused.errno != errno.ENOENT:
            raise
    try:
        pins.require_attached()
    except OtherVersion:
        raise
    except NotAttached:
        return Pinned.NOTHING
    return Pinned.SAME
