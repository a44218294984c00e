"""Acceleration as a whole node has it: its program on the socket hash, the level that counts, who else has such maps.

The level is a map's value, so it can be changed at any time: connections under way go on over TCP, or are redirected
again. What decides about it is above this folder.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from bpf import syscalls
from bpf.compiler import MESSAGE_HOOK
from bpf.errors import KernelRefused
from bpf.layout import Level, Node
from bpf.pins import Descriptor, Pins
from bpf.probing import loading
from bpf.tables import Tables

# uapi/linux/bpf.h: map types SOCKMAP and SOCKHASH
_SOCKET_MAPS = (15, 18)
# SK_SKB_STREAM_PARSER, SK_SKB_STREAM_VERDICT, SK_MSG_VERDICT, SK_SKB_VERDICT
_SOCKET_HOOKS = (4, 5, 7, 38)
_OURS = ("ss_", "ssp_")


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
    room = Node.reason.size - 1
    reason = node.reason.encode()[:room].decode(errors="ignore").encode()
    tables.set_node(Node(node.level, node.wanted, reason))


def level_of(tables: Tables) -> NodeLevel:
    """What counts now."""
    found = tables.node_settings()
    return NodeLevel(Level(found.wanted), Level(found.acceleration), found.reason.decode())


def other_owners() -> Iterator[str]:
    """Socket maps of others that have programs, a phrase each: a socket can be in one such map only."""
    for map_id in syscalls.map_ids():
        with suppress(KernelRefused), Descriptor(syscalls.open_map_id(map_id)) as found:  # it may be gone by now
            info = syscalls.map_info(found.fd)
            if info.type not in _SOCKET_MAPS:
                continue
            names = [name for hook in _SOCKET_HOOKS for name in _attached(found.fd, hook)]
            if names and not all(name.startswith(_OURS) for name in names):
                yield f"{', '.join(names)} on map {info.name.decode()} (id {info.id})"


def _attached(map_fd: int, hook: int) -> list[str]:
    """The names of what a socket map has on a hook; nothing where the kernel can't tell (before 5.18)."""
    try:
        return list(loading.program_names(loading.attached_to(map_fd, hook).programs))
    except KernelRefused:
        return []
