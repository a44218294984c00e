"""Acceleration as a whole node has it: its program on the socket hash, the level that counts, who else has such maps.

The level is a map's value, so it can be changed at any time: connections under way go on over TCP, or are redirected
again. What decides about it is above this folder.
"""

import ctypes
import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from bpf import syscalls
from bpf.compiler import MESSAGE_HOOK
from bpf.errors import KernelRefused
from bpf.foreign import attached_to, program_names
from bpf.layout import TABLES, Level, NodeEntry
from bpf.pins import Descriptor, Pins
from bpf.tables import Tables

# uapi/linux/bpf.h: map types SOCKMAP and SOCKHASH
_SOCKET_MAPS = (15, 18)
# SK_SKB_STREAM_PARSER, SK_SKB_STREAM_VERDICT, SK_MSG_VERDICT, SK_SKB_VERDICT
_SOCKET_HOOKS = (4, 5, 7, 38)
_OURS = [(name, TABLES[name]) for name in ("accelerated", "listeners")]


@dataclass(frozen=True)
class NodeLevel:
    """The level of the node: what was asked for, what counts, and why that is less or what is to be known of it."""

    wanted: Level
    level: Level
    reason: str


def is_possible(pins: Pins) -> bool:
    """Whether this kernel has taken the program that redirects."""
    return (pins.programs / MESSAGE_HOOK.name).exists()


def attach_messages(pins: Pins) -> None:
    """Give the socket hash our program. Raises KernelRefused, NotAttached."""
    with (
        Descriptor(syscalls.open_pin(pins.programs / MESSAGE_HOOK.name)) as program,
        Descriptor(pins.open_map("accelerated")) as sockets,
    ):
        syscalls.attach_to_map(program.fd, sockets.fd, MESSAGE_HOOK.attach_type, "accelerated")


def set_level(tables: Tables, node: NodeLevel) -> None:
    """Make it count from now on, for new connections and those under way."""
    room = NodeEntry.reason.size - 1
    reason = node.reason.encode()[:room].decode(errors="ignore").encode()
    tables.set_node(NodeEntry(node.level, node.wanted, reason))


def level_of(tables: Tables) -> NodeLevel:
    """What counts now."""
    found = tables.node_settings()
    return NodeLevel(Level(found.wanted), Level(found.acceleration), found.reason.decode())


def other_owners(pins: Pins) -> Iterator[str]:
    """Socket maps that have programs of others, a phrase each: a socket can be in one such map only."""
    own_map, own_program = _own(pins)
    for map_id in syscalls.map_ids():
        with suppress(KernelRefused), Descriptor(syscalls.open_map_id(map_id)) as found:  # it may be gone by now
            info = syscalls.map_info(found.fd)
            if info.type not in _SOCKET_MAPS or (info.id != own_map and _is_of_our_shape(info)):
                continue
            where = f"map {info.name.decode(errors='replace')} (id {info.id})"
            try:
                programs = [each for hook in _SOCKET_HOOKS for each in _attached(found.fd, hook) if each != own_program]
            except KernelRefused:  # before 5.18 it can't tell
                if info.id != own_map:
                    yield f"whoever made {where}: this kernel does not say which programs are on it"
                continue
            if programs:
                yield f"{', '.join(program_names(tuple(programs)))} on {where}"


def _own(pins: Pins) -> tuple[int, int]:
    """The ids of the socket hash and of the program on it; 0 where there is none."""
    ids = []
    for path, info_of in (
        (pins.maps / "accelerated", syscalls.map_info),
        (pins.programs / MESSAGE_HOOK.name, syscalls.program_info),
    ):
        try:
            with Descriptor(syscalls.open_pin(path)) as opened:
                ids.append(info_of(opened.fd).id)
        except KernelRefused:
            ids.append(0)
    return ids[0], ids[1]


def _is_of_our_shape(info: syscalls.MapInfo) -> bool:
    """Whether it is a table of sidestep's, as a self-test has its own, with a program that only its sockets meet."""
    name, sizes = info.name.decode(errors="replace"), (info.key_size, info.value_size)
    return sizes in [(ctypes.sizeof(key), ctypes.sizeof(value)) for table, (key, value) in _OURS if table == name]


def _attached(map_fd: int, hook: int) -> tuple[int, ...]:
    """The ids of what a socket map has on a hook. Raises KernelRefused where the kernel can't tell."""
    try:
        return attached_to(map_fd, hook).programs
    except KernelRefused as error:
        if getattr(error, "errno", 0) == errno.EOPNOTSUPP:  # it knows the question, but not this hook
            return ()
        raise
