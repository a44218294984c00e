"""Each pod's own program: an instance of ss_steer (lookup.c), loaded at ADD with the pod's netns cookie as a constant.

The map `steering` keeps the code with a mark where the cookie goes, and with maps by name. So whoever enrols a pod
needs no compiler.
"""

import ctypes
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache

from bpf import syscalls
from bpf.bytecode import INSTRUCTION, LOAD_WIDE, NUMBER, Program, instructions_of
from bpf.errors import CompileFailed, KernelRefused, NotAttached
from bpf.hooks import LOOKUP_HOOK, NETNS_HOOK
from bpf.layout import COOKIE_MARK, STEERING_INSTRUCTIONS, STEERING_MAPS, SteeringEntry, Word
from bpf.pins import Pins
from bpf.syscalls import Descriptor

_KEPT, _CALLED = "steering", "inbound"  # the map that keeps the code, and the one through which it calls ss_sk_lookup


@dataclass(frozen=True)
class _Template:
    """Kept code, ready for a cookie."""

    name: str  # by the code, as the tag of an instance depends on its cookie; the kernel keeps 15 characters
    code: bytes
    marks: tuple[int, ...]  # where a cookie goes: indices of wide loads
    maps: tuple[str, ...]

    def with_cookie(self, cookie: int) -> bytes:
        """The code of one pod's instance."""
        code = bytearray(self.code)
        lower, upper = struct.unpack("=ii", struct.pack("=Q", cookie))
        for at in self.marks:  # the immediate is in the last four bytes of an instruction
            struct.pack_into("=i", code, at * INSTRUCTION.size + 4, lower)
            struct.pack_into("=i", code, (at + 1) * INSTRUCTION.size + 4, upper)
        return bytes(code)


def keep(steering_fd: int, program: Program) -> None:
    """Keep a compiled program in the open map `steering`. Raises CompileFailed, KernelRefused."""
    if number := syscalls.map_update(steering_fd, Word(0), entry_of(program)):
        raise syscalls.refused("bpf_map_update_elem", _KEPT, number)


def entry_of(program: Program) -> SteeringEntry:
    """The map's entry. Raises CompileFailed if there is no room for the program, or no mark in it."""
    instructions = instructions_of(program.code)
    marks = len(_marks(instructions))
    if not marks or len(instructions) > STEERING_INSTRUCTIONS or len(program.maps) > STEERING_MAPS:
        raise CompileFailed(
            f"{NETNS_HOOK.function} has {len(instructions)} instructions, {len(program.maps)} maps and {marks} places "
            f"for a cookie; up to {STEERING_INSTRUCTIONS}, up to {STEERING_MAPS} and at least one are right"
        )
    entry = SteeringEntry(instructions=len(instructions), maps=len(program.maps))
    for index, name in enumerate(program.maps):
        entry.name[index].value = name.encode()
    ctypes.memmove(entry.code, program.code, len(program.code))
    return entry


def load_instance(maps: Mapping[str, int], cookie: int) -> int:
    """Load the instance of a pod; the caller closes the descriptor.

    `maps` are open descriptors by name, at least those of opened(). Raises NotAttached, KernelRefused.
    """
    template = _template(_kept(maps[_KEPT]))
    descriptors = [maps[name] for name in template.maps]
    kind, attach_type = NETNS_HOOK.program_type, NETNS_HOOK.attach_type
    return syscalls.load_program(template.name, kind, attach_type, template.with_cookie(cookie), descriptors)


@contextmanager
def opened(pins: Pins) -> Iterator[dict[str, int]]:
    """The pinned maps that load_instance() needs, by name. Raises NotAttached, KernelRefused."""
    with ExitStack() as stack:
        found = {_KEPT: stack.enter_context(Descriptor(pins.open_map(_KEPT))).fd}
        for name in _template(_kept(found[_KEPT])).maps:
            found[name] = stack.enter_context(Descriptor(pins.open_map(name))).fd
        yield found


def name_of_instances(pins: Pins) -> str:
    """What the kernel calls the instances of the code that is kept now. Raises NotAttached, KernelRefused."""
    with Descriptor(pins.open_map(_KEPT)) as kept:
        return _template(_kept(kept.fd)).name


def lead_to_lookup(inbound_fd: int, program_fd: int) -> None:
    """Have every pod's instance call this program, ss_sk_lookup, from now on. Raises KernelRefused."""
    if number := syscalls.map_update(inbound_fd, Word(0), Word(program_fd)):
        raise syscalls.refused("bpf_map_update_elem", _CALLED, number)


def leads_to_lookup(pins: Pins) -> bool:
    """Whether the pods' instances call the pinned ss_sk_lookup. If not, they refuse all inbound packets.

    The kernel empties a map of programs when nobody has it open or pinned any more.
    """
    called = Word()
    try:
        lookup = syscalls.open_pin(pins.programs / LOOKUP_HOOK.name, syscalls.READ_ONLY)
        with Descriptor(lookup) as program, Descriptor(pins.open_map(_CALLED)) as inbound:
            found = syscalls.map_lookup(inbound.fd, Word(0), called)
            return found and called.word == syscalls.program_info(program.fd).id
    except (KernelRefused, NotAttached):
        return False


def _kept(steering_fd: int) -> bytes:
    entry = SteeringEntry()
    if not syscalls.map_lookup(steering_fd, Word(0), entry):
        raise NotAttached(f"the map {_KEPT} is empty; run `sidestep attach` (or start the agent)")
    return bytes(entry)


@lru_cache(maxsize=2)
def _template(kept: bytes) -> _Template:
    entry = SteeringEntry.from_buffer_copy(kept)
    code = bytes(entry.code)[: entry.instructions * INSTRUCTION.size]
    return _Template(
        f"ss_{hashlib.sha256(kept).hexdigest()[:12]}",
        code,
        tuple(_marks(instructions_of(code))),
        tuple(entry.name[index].value.decode() for index in range(entry.maps)),
    )


def _marks(instructions: Sequence[tuple[int, ...]]) -> list[int]:
    """Where a cookie goes: the wide loads of COOKIE_MARK."""
    return [
        at
        for at, (opcode, registers, *_) in enumerate(instructions)
        if opcode == LOAD_WIDE and registers >> 4 == NUMBER and _wide(instructions, at) == COOKIE_MARK
    ]


def _wide(instructions: Sequence[tuple[int, ...]], at: int) -> int:
    """The 64-bit value of a wide load."""
    (value,) = struct.unpack("=Q", struct.pack("=ii", instructions[at][3], instructions[at + 1][3]))
    return int(value)
