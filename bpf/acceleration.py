"""Acceleration on a node: its program on the socket hash, the node's level, and other programs on socket maps.

The level is a value in a map, so it can change at any time. Messages on open connections follow it at once: they go by
TCP, or are redirected again. installer/acceleration decides which level to set.
"""

import ctypes
import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.hooks import MESSAGE_HOOK
from bpf.layout import TABLES, Level, NodeEntry
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables

# uapi/linux/bpf.h: map types SOCKMAP and SOCKHASH
_SOCKET_MAPS = (15, 18)
# SK_SKB_STREAM_PARSER, SK_SKB_STREAM_VERDICT, SK_MSG_VERDICT, SK_SKB_VERDICT
_SOCKET_HOOKS = (4, 5, 7, 38)
_OURS = [(name, TABLES[name]) for name in ("accelerated", "listeners")]


@dataclass(frozen=True)
class NodeLevel:
    """The node's level: the level asked for, the level now, and a reason.

    The reason says why the level is lower than asked for, or what applications notice at it. Otherwise it is empty.
    """

    wanted: Level
    level: Level
    reason: str


def is_possible(pins: Pins) -> bool:
    """Whether this kernel has accepted the program that redirects messages."""
    return (pins.programs / MESSAGE_HOOK.name).exists() or _unpinned_program(pins) is not None


def repin_messages(pins: Pins) -> bool:
    """Pin the program again that is attached to the socket hash, if somebody has removed its pin. Returns whether so.

    Kernels before 5.18 do not say which program is attached. Raises KernelRefused.
    """
    number = _unpinned_program(pins)
    if number is None:
        return False
    with Descriptor(syscalls.open_program_id(number)) as program:
        syscalls.pin(program.fd, pins.programs / MESSAGE_HOOK.name)
    return True


def _unpinned_program(pins: Pins) -> int | None:
    """The id of our program on the socket hash, if it has no pin."""
    if (pins.programs / MESSAGE_HOOK.name).exists():
        return None
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(pins.maps / "accelerated")) as sockets:
        own_map = syscalls.map_info(sockets.fd).id
        programs = syscalls.attached_to(sockets.fd, MESSAGE_HOOK.attach_type).programs
        return next((each for each in programs if _is_ours(each, own_map)), None)
    return None


def _is_ours(program_id: int, own_map: int) -> bool:
    """Whether a program is sidestep's by the map that it works with, whether or not it is pinned."""
    with suppress(KernelRefused):
        return syscalls.uses_map(program_id, [own_map])
    return False


def attach_messages(pins: Pins) -> None:
    """Attach our program to the socket hash. Raises KernelRefused, NotAttached."""
    with (
        Descriptor(syscalls.open_pin(pins.programs / MESSAGE_HOOK.name)) as program,
        Descriptor(pins.open_map("accelerated")) as sockets,
    ):
        syscalls.attach_to_map(program.fd, sockets.fd, MESSAGE_HOOK.attach_type, "accelerated")


def detach_messages(pins: Pins) -> None:
    """Take an earlier program of ours off the socket hash: the programs that are attached now do without it.

    Kernels before 5.18 do not say which program is attached, so there it stays, and gets no new sockets. Raises
    KernelRefused.
    """
    number = _unpinned_program(pins)
    if number is None:
        return
    with (
        Descriptor(syscalls.open_program_id(number)) as program,
        Descriptor(syscalls.open_pin(pins.maps / "accelerated")) as sockets,
    ):
        syscalls.detach_from_map(program.fd, sockets.fd, MESSAGE_HOOK.attach_type, "accelerated")


def set_level(tables: Tables, node: NodeLevel) -> None:
    """Set the node's level, for new and open connections. The reason is cut to 247 bytes. Raises KernelRefused."""
    room = NodeEntry.reason.size - 1
    reason = node.reason.encode()[:room].decode(errors="ignore").encode()
    tables.set_node(NodeEntry(node.level, node.wanted, reason))


def level_of(tables: Tables) -> NodeLevel:
    """The node's level now. Raises KernelRefused."""
    found = tables.node_settings()
    return NodeLevel(Level(found.wanted), Level(found.acceleration), found.reason.decode())


def other_owners(pins: Pins) -> Iterator[str]:
    """A phrase for each socket map with programs that are not ours. A socket can have only one such program.

    Kernels before 5.18 do not say which programs are on a map. There, every socket map that is not sidestep's counts.
    """
    own_map, own_program = _own(pins)
    for map_id in syscalls.map_ids():
        with suppress(KernelRefused), Descriptor(syscalls.open_map_id(map_id)) as found:  # it may be gone by now
            info = syscalls.map_info(found.fd)
            if info.type not in _SOCKET_MAPS or (info.id != own_map and _is_of_our_shape(info)):
                continue
            where = f"map {info.name.decode(errors='replace')} (id {info.id})"
            try:
                programs = [each for hook in _SOCKET_HOOKS for each in _attached(found.fd, hook) if each != own_program]
            except KernelRefused:  # before 5.18
                if info.id != own_map:
                    yield f"{where}, whose programs this kernel does not name"
                continue
            if info.id == own_map:  # without its pin, our own program is not known by its id
                programs = [each for each in programs if not _is_ours(each, own_map)]
            if programs:
                yield f"{', '.join(syscalls.program_names(programs))} on {where}"


def _own(pins: Pins) -> tuple[int, int]:
    """The ids of the pinned socket hash and of its pinned program; 0 if one is missing."""
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
    """Whether a map has the name and sizes of one of sidestep's socket maps.

    A self-test makes such maps of its own. Their program runs for the self-test's sockets only.
    """
    name, sizes = info.name.decode(errors="replace"), (info.key_size, info.value_size)
    return sizes in [(ctypes.sizeof(key), ctypes.sizeof(value)) for table, (key, value) in _OURS if table == name]


def _attached(map_fd: int, hook: int) -> tuple[int, ...]:
    """The ids of the programs on one hook of a socket map. Raises KernelRefused if the kernel cannot tell."""
    try:
        return syscalls.attached_to(map_fd, hook).programs
    except KernelRefused as error:
        if error.errno == errno.EOPNOTSUPP:  # the kernel can tell, but does not know this hook
            return ()
        raise
