"""What makes a layout of the maps another one, and which maps two layouts have in common."""

from pathlib import Path

import pytest

from bpf import shapes
from bpf.layout import STORAGES, TABLES

SOURCE = Path(shapes.__file__).with_name("maps.h").read_text()


def test_every_map_has_a_shape() -> None:
    assert set(shapes.shapes_in(SOURCE)) == {*TABLES, *STORAGES}


@pytest.mark.parametrize(
    ("before", "after", "resized", "other"),
    [
        ("#define MAX_ADDRESSES 131072", "#define MAX_ADDRESSES 131073", {"addresses"}, set()),
        ("    struct address source4;", "    __u32 more;\n    struct address source4;", set(), {"pods"}),
        ("    struct address address;\n    __be16", "    __be16", set(), {"sockets", "resolvers", "handshakes"}),
        ("    TOTALS,\n", "    TOTAL_MORE,\n    TOTALS,\n", {"totals"}, {"tallies"}),
        ("#define SPREAD4 0x7f400000", "#define SPREAD4 0x7f800000", set(), set()),
        (" * One mesh pod:", " * One pod of the mesh:", set(), set()),
    ],
)
def test_a_change_is_of_the_maps_it_is_about(before: str, after: str, resized: set[str], other: set[str]) -> None:
    assert SOURCE.count(before) == 1
    ours, theirs = shapes.shapes_in(SOURCE), shapes.shapes_in(SOURCE.replace(before, after))
    assert {name for name in ours if ours[name].entry != theirs[name].entry} == other
    assert {name for name in ours if ours[name].whole != theirs[name].whole} == resized | other
