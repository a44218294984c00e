"""Compiled code as a file: what is packed comes out again, and nothing else does."""

import json
from dataclasses import replace

import pytest

from bpf.bytecode import INSTRUCTION, Bytecode, Map, Program, Unreadable, portable

LOAD_WIDE, MOVE, EXIT = 0x18, 0xB7, 0x95
NAMES = {7: "pods", 9: "routes"}
WHOLE = Bytecode(
    {"pods": Map(1, 8, 1268, 4096, 1, 3, 5), "events": Map(27, 0, 0, 1 << 21, 0, 0, 0)},
    {"connect4": Program(INSTRUCTION.pack(EXIT, 0, 0, 0), ("pods",)), "exit": Program(b"", ())},
    b"\x9f\xeb\x01\x00",
    {"/usr/lib/libbcc.so.0": (3398840, 1676246400 * 10**9)},
)


def test_what_is_packed_comes_out_again() -> None:
    assert Bytecode.unpacked(WHOLE.packed()) == WHOLE


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        WHOLE.packed()[:-1],
        WHOLE.packed().replace(b'"flags"', b'"flag"'),
        WHOLE.packed().replace(b'"types": "', b'"types": "*'),
        json.dumps(json.loads(WHOLE.packed()) | {"programs": 4}).encode(),
        json.dumps(json.loads(WHOLE.packed()) | {"compiler": {"libbcc": 1}}).encode(),
        replace(WHOLE, maps={}).packed(),
    ],
)
def test_anything_else_is_unreadable(packed: bytes) -> None:
    with pytest.raises(Unreadable):
        Bytecode.unpacked(packed)


def test_code_refers_to_maps_by_name_and_each_name_is_there_once() -> None:
    by_descriptor, by_index = 1 << 4, 5 << 4
    code = [
        *((LOAD_WIDE, by_descriptor | 1, 0, 9), (0, 0, 0, 0)),
        *((LOAD_WIDE, by_descriptor | 2, 0, 7), (0, 0, 0, 0)),
        *((LOAD_WIDE, by_descriptor | 1, 0, 9), (0, 0, 0, 0)),
        *((LOAD_WIDE, 3, 0, 7), (0, 0, 0, 1)),  # a number
        (MOVE, by_descriptor, 0, 7),
        (EXIT, 0, 0, 0),
    ]
    program = portable(b"".join(INSTRUCTION.pack(*each) for each in code), NAMES.__getitem__)
    assert program.maps == ("routes", "pods")
    found = list(INSTRUCTION.iter_unpack(program.code))
    assert [found[at] for at in (0, 2, 4)] == [
        (LOAD_WIDE, by_index | 1, 0, 0),
        (LOAD_WIDE, by_index | 2, 0, 1),
        (LOAD_WIDE, by_index | 1, 0, 0),
    ]
    assert found[6:] == code[6:]
