"""Compiled code as any process can load it, on this kernel, without a compiler.

Each program refers to maps by name, and each map is described as it has to be made. The maps' types (BTF) come along:
the kernel makes no socket storage without them, and `bpftool map dump` shows an entry field by field by them.
"""

import base64
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

# struct bpf_insn (uapi/linux/bpf.h): opcode, both registers, offset, immediate
INSTRUCTION = struct.Struct("=BBhi")
LOAD_WIDE = 0x18  # BPF_LD | BPF_IMM | BPF_DW: takes two instructions, the upper half of the value is in the second
# what the source register of such a load says of its value (BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_IDX since Linux 5.14)
NUMBER, _MAP_DESCRIPTOR, _MAP_INDEX = 0, 1, 5


class Unreadable(Exception):
    """Bytes that are not packed bytecode."""


@dataclass(frozen=True)
class Program:
    """A program's instructions. They refer to maps by their index in `maps`, names."""

    code: bytes
    maps: tuple[str, ...]


@dataclass(frozen=True)
class Map:
    """What the kernel is told to make a map: its type and flags (uapi/linux/bpf.h), and sizes in bytes.

    `key_type` and `value_type` are ids in the BTF of all maps; 0 if the map has no types.
    """

    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key_type: int
    value_type: int


@dataclass(frozen=True)
class Bytecode:
    """One compiled unit: every map and every program, by name; the programs by the names of their hooks."""

    maps: Mapping[str, Map]
    programs: Mapping[str, Program]
    types: bytes  # the maps' BTF (Documentation/bpf/btf.rst)
    compiler: Mapping[str, tuple[int, int]]  # files of the compiler: path → size in bytes, time of writing in ns

    def packed(self) -> bytes:
        """As the bytes of a file."""
        programs = {name: {"code": _text(each.code), "maps": each.maps} for name, each in self.programs.items()}
        maps = {name: asdict(each) for name, each in self.maps.items()}
        compiler = dict(self.compiler)
        found = {"maps": maps, "programs": programs, "types": _text(self.types), "compiler": compiler}
        return json.dumps(found).encode()

    @classmethod
    def unpacked(cls, packed: bytes) -> "Bytecode":
        """What was packed. Raises Unreadable."""
        try:
            found = json.loads(packed)
            maps = {name: Map(**each) for name, each in found["maps"].items()}
            programs = {
                name: Program(_bytes(each["code"]), tuple(each["maps"])) for name, each in found["programs"].items()
            }
            compiler = {path: (size, time) for path, (size, time) in found["compiler"].items()}
            types = _bytes(found["types"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unreadable(f"it is no bytecode ({type(error).__name__}: {error})") from error
        if unknown := {name for each in programs.values() for name in each.maps if name not in maps}:
            raise Unreadable(f"programs use maps that are not in it: {', '.join(sorted(unknown))}")
        return cls(maps, programs, types, compiler)


def instructions_of(code: bytes) -> list[tuple[int, int, int, int]]:
    """The instructions of a program: opcode, both registers, offset, immediate."""
    return list(INSTRUCTION.iter_unpack(code))


def code_of(instructions: Sequence[tuple[int, int, int, int]]) -> bytes:
    """The reverse."""
    return b"".join(INSTRUCTION.pack(*each) for each in instructions)


def portable(code: bytes, name_of: Callable[[int], str]) -> Program:
    """A program whose code refers to maps by descriptors of this process, as another process can load it.

    `name_of` tells a map's name by its descriptor.
    """
    instructions = instructions_of(code)
    names: list[str] = []
    for at, (opcode, registers, _, value) in enumerate(instructions):
        if opcode == LOAD_WIDE and registers >> 4 == _MAP_DESCRIPTOR:
            name = name_of(value)
            names += [name] if name not in names else []
            instructions[at] = (opcode, registers & 0xF | _MAP_INDEX << 4, 0, names.index(name))
    return Program(code_of(instructions), tuple(names))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
