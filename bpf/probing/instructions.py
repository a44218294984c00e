"""A handful of BPF instructions by hand: the probe's programs are a few lines each and must not wait for a compiler.

Each function returns encoded instructions (struct bpf_insn, uapi/linux/bpf.h: 8 bytes, little-endian machines only);
programs are made by joining them. Registers are numbers: r1–r5 arguments, r6–r9 kept over calls, r10 the stack's end.
"""

import struct

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)
SIZE = 8  # bytes of an instruction, the unit of jumps

# memory access widths: the size bits of the opcode
HALF, WORD, QUAD = 0x08, 0x00, 0x18

_LDX, _ST, _STX = 0x61, 0x62, 0x63  # BPF_MEM of a word; the width is added
_MOV_IMM, _MOV, _ADD_IMM = 0xB7, 0xBF, 0x07
_JEQ_IMM, _JNE_IMM, _JGT = 0x15, 0x55, 0x2D
_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1
_CALL, _EXIT = 0x85, 0x95


def _encode(opcode: int, to: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, source << 4 | to, offset, number)


def move(to: int, source: int) -> bytes:
    """Copy a register."""
    return _encode(_MOV, to, source)


def put(to: int, number: int) -> bytes:
    """A signed 32-bit number into a register."""
    return _encode(_MOV_IMM, to, number=number)


def add(to: int, number: int) -> bytes:
    """Add a number to a register."""
    return _encode(_ADD_IMM, to, number=number)


def load(width: int, to: int, source: int, offset: int) -> bytes:
    """Read memory at register + offset."""
    return _encode(_LDX | width, to, source, offset)


def store(width: int, to: int, offset: int, source: int) -> bytes:
    """Write a register to memory at register + offset."""
    return _encode(_STX | width, to, source, offset)


def store_number(width: int, to: int, offset: int, number: int) -> bytes:
    """Write a number to memory at register + offset; the stack, or through a value's pointer, but no context."""
    return _encode(_ST | width, to, 0, offset, number)


def map_pointer(to: int, fd: int) -> bytes:
    """The map behind a descriptor, as a helper's argument."""
    return _encode(_LD_IMM64, to, _PSEUDO_MAP_FD, number=fd) + _encode(0)


def call(helper: int) -> bytes:
    """Call a helper by its number (___BPF_FUNC_MAPPER)."""
    return _encode(_CALL, number=helper)


def give(number: int) -> bytes:
    """Return a number."""
    return put(R0, number) + _encode(_EXIT)


def when(register: int, number: int, body: bytes) -> bytes:
    """Run `body` only if the register has this value."""
    return _encode(_JNE_IMM, register, offset=len(body) // SIZE, number=number) + body


def unless(register: int, number: int, body: bytes) -> bytes:
    """Run `body` only if the register has another value."""
    return _encode(_JEQ_IMM, register, offset=len(body) // SIZE, number=number) + body


def unless_beyond(register: int, end: int, body: bytes) -> bytes:
    """Run `body` only if one pointer is not greater than the other: how a program proves that bytes are there."""
    return _encode(_JGT, register, end, offset=len(body) // SIZE) + body
