"""The lookup program, an instance of it for each pod: compiled once, kept in the map `steering`, loaded at ADD.

A lookup program can't ask in whose namespace it runs, so each instance has its pod's netns cookie as a constant. The
compiler's child keeps the code with a mark where the cookie goes and with maps by name, so that whoever enrols a pod
needs no compiler. Loading an instance takes the kernel 1.5 ms and 8 KiB.
"""

import ctypes
import hashlib
import struct
from collections.abc import Callable
from contextlib import ExitStack

from bpf import syscalls
from bpf.errors import CompileFailed, NotAttached
from bpf.hooks import NETNS_HOOK
from bpf.layout import COOKIE_MARK, STEERING_INSTRUCTIONS, STEERING_MAPS, SteeringEntry, Word
from bpf.pins import Pins
from bpf.syscalls import Descriptor

# struct bpf_insn (uapi/linux/bpf.h): opcode, both registers, offset, immediate
_INSTRUCTION = struct.Struct("=BBhi")
_LOAD_WIDE = 0x18  # BPF_LD | BPF_IMM | BPF_DW: takes two instructions, the upper half of the value is in the second
# what the source register of such a load says of its value (BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_IDX since Linux 5.14)
_NUMBER, _MAP_DESCRIPTOR, _MAP_INDEX = 0, 1, 5


def keep(steering_fd: int, code: bytes, name_of: Callable[[int], str]) -> None:
    """Keep compiled code, whose maps are descriptors of this process, in the open map `steering`.

    `name_of` tells a map's name by its descriptor. Raises CompileFailed, KernelRefused.
    """
    entry = portable(code, name_of)
    if number := syscalls.map_update(steering_fd, Word(0), entry):
        raise syscalls.refused("bpf_map_update_elem", "steering", number)


def portable(code: bytes, name_of: Callable[[int], str]) -> SteeringEntry:
    """Code as another process can load it. Raises CompileFailed if there is no room for it, or no mark in it."""
    instructions = list(_INSTRUCTION.iter_unpack(code))
    names: list[str] = []
    marks = 0
    for at, (opcode, registers, _, value) in enumerate(instructions):
        if opcode != _LOAD_WIDE:
            continue
        if registers >> 4 == _MAP_DESCRIPTOR:
            name = name_of(value)
            names += [name] if name not in names else []
            instructions[at] = (opcode, registers & 0xF | _MAP_INDEX << 4, 0, names.index(name))
        elif registers >> 4 == _NUMBER and _wide(instructions, at) == COOKIE_MARK:
            marks += 1
    if not marks or len(instructions) > STEERING_INSTRUCTIONS or len(names) > STEERING_MAPS:
        raise CompileFailed(
            f"the lookup program has {len(instructions)} instructions, {len(names)} maps and {marks} places for a "
            f"cookie; up to {STEERING_INSTRUCTIONS}, up to {STEERING_MAPS} and at least one are right"
        )
    entry = SteeringEntry(instructions=len(instructions), maps=len(names))
    for index, name in enumerate(names):
        entry.name[index].value = name.encode()
    packed = b"".join(_INSTRUCTION.pack(*each) for each in instructions)
    ctypes.memmove(entry.code, packed, len(packed))
    return entry


def load_instance(pins: Pins, cookie: int) -> int:
    """Load the instance of a pod; the caller closes the descriptor. Raises NotAttached, KernelRefused."""
    entry = _kept(pins)
    with ExitStack() as opened:
        maps = [
            opened.enter_context(Descriptor(syscalls.open_pin(pins.maps / entry.name[index].value.decode()))).fd
            for index in range(entry.maps)
        ]
        code = _with_cookie(_code_of(entry), cookie)
        return syscalls.load_program(_name(entry), NETNS_HOOK.program_type, NETNS_HOOK.attach_type, code, maps)


def name_of_instances(pins: Pins) -> str:
    """What the kernel calls the instances of the code that is kept now. Raises NotAttached, KernelRefused."""
    return _name(_kept(pins))


def _kept(pins: Pins) -> SteeringEntry:
    entry = SteeringEntry()
    with Descriptor(pins.open_map("steering")) as kept:
        if not syscalls.map_lookup(kept.fd, Word(0), entry):
            raise NotAttached(f"{pins.maps / 'steering'} is empty; run `sidestep attach` (or start the agent)")
    return entry


def _name(entry: SteeringEntry) -> str:
    """By the code, as an instance's own tag depends on its cookie; the kernel keeps 15 characters."""
    return f"ss_{hashlib.sha256(bytes(entry)).hexdigest()[:12]}"


def _code_of(entry: SteeringEntry) -> bytes:
    return bytes(entry.code)[: entry.instructions * _INSTRUCTION.size]


def _with_cookie(code: bytes, cookie: int) -> bytes:
    """The code with a cookie in all of the marked places."""
    instructions = list(_INSTRUCTION.iter_unpack(code))
    lower, upper = struct.unpack("=ii", struct.pack("=Q", cookie))
    for at, (opcode, registers, offset, _) in enumerate(instructions):
        if opcode == _LOAD_WIDE and registers >> 4 == _NUMBER and _wide(instructions, at) == COOKIE_MARK:
            instructions[at] = (opcode, registers, offset, lower)
            instructions[at + 1] = (*instructions[at + 1][:3], upper)
    return b"".join(_INSTRUCTION.pack(*each) for each in instructions)


def _wide(instructions: list[tuple[int, ...]], at: int) -> int:
    """The 64-bit value of a wide load."""
    (value,) = struct.unpack("=Q", struct.pack("=ii", instructions[at][3], instructions[at + 1][3]))
    return int(value)
