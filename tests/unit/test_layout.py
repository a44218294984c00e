"""The Python mirror of maps.h has the C compiler's sizes and offsets."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from bpf import layout
from tests.unit.compile_c import BPF, build

# by the struct of maps.h that each stands for; the others are plain numbers there
MIRRORS = {
    re.sub(r"(?<!^)([A-Z])", r"_\1", name.removesuffix("Entry")).lower(): each
    for name, each in vars(layout).items()
    if isinstance(each, type) and issubclass(each, ctypes.Structure) and name not in ("Cookie", "Word", "Quad")
}
STORED = {
    "sockets": "socket_state",
    "resolvers": "nameservers",
    "pairings": "pairing",
    "counted": "counted",
    "shadowed": "shadow",
}


def fields_of(mirror: type[ctypes.Structure]) -> list[str]:
    return [field[0] for field in mirror._fields_]


@pytest.fixture(scope="module")
def c_layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """(offset, size) of every "struct.field", and (0, size) of every "struct", as gcc has them."""
    lines = []
    for struct, mirror in MIRRORS.items():
        lines.append(f'printf("{struct} 0 %zu\\n", sizeof(struct {struct}));')
        for field in fields_of(mirror):
            name = {"bytes": "word"}.get(field, field)
            lines.append(
                f'printf("{struct}.{field} %zu %zu\\n", offsetof(struct {struct}, {name}), '
                f"sizeof(((struct {struct} *)0)->{name}));"
            )
    lines += [f'printf("{struct} 0 %zu\\n", sizeof(struct {struct}));' for struct in STORED.values()]
    program = build(tmp_path_factory.mktemp("layout"), f"int main(void) {{ {' '.join(lines)} return 0; }}")
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in printed.splitlines())
    return {name: (int(offset), int(size)) for name, offset, size in rows}


@pytest.mark.parametrize("struct", MIRRORS)
def test_every_field_lies_where_c_has_it(struct: str, c_layout: dict[str, tuple[int, int]]) -> None:
    mirror = MIRRORS[struct]
    assert ctypes.sizeof(mirror) == c_layout[struct][1]
    for field in fields_of(mirror):
        descriptor = getattr(mirror, field)
        assert (descriptor.offset, descriptor.size) == c_layout[f"{struct}.{field}"], field


@pytest.mark.parametrize(("name", "struct"), STORED.items())
def test_what_is_kept_with_sockets_has_the_size_of_c(
    name: str, struct: str, c_layout: dict[str, tuple[int, int]]
) -> None:
    assert layout.STORAGES[name] == c_layout[struct][1]


@pytest.mark.parametrize("struct", MIRRORS)
def test_no_field_of_c_is_missing_in_python(struct: str) -> None:
    text = re.sub(r"/\*.*?\*/", "", (BPF / "maps.h").read_text(), flags=re.S)
    body = re.search(rf"struct {struct} \{{(.*?)\n\}}", text, re.S)
    assert body is not None
    declared = re.findall(r"(\w+)(?:\[\w+\])*;", body[1])
    assert len(declared) == len(fields_of(MIRRORS[struct]))


def test_every_table_of_c_that_user_space_opens_is_known() -> None:
    text = (BPF / "maps.h").read_text()
    declared = re.findall(r"^(?:SOCKET_)?TABLE\((?:\"\w+\", )?(?:struct )?\w+, (?:struct )?\w+, (\w+)", text, re.M)
    assert sorted(declared) == sorted(layout.TABLES)


def test_flags_have_the_values_of_c(tmp_path: Path) -> None:
    names = {f"POD_{flag.name}": flag.value for flag in layout.PodFlags}
    names |= {f"PORT_{rule.name}": rule.value for rule in layout.PortRule}
    names |= {f"NETWORK_{verdict.name}": verdict.value for verdict in layout.NetworkVerdict}
    names |= {"OUTBOUND_PORT": layout.OUTBOUND_PORT, "INBOUND_PORT": layout.INBOUND_PORT}
    body = " ".join(f'printf("{name} %u\\n", (unsigned){name});' for name in names)
    program = build(tmp_path, f"int main(void) {{ {body} return 0; }}")
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert {row.split()[0]: int(row.split()[1]) for row in printed.splitlines()} == names
