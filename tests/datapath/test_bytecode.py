"""Programs are compiled once: whoever loads them later needs no compiler, if what is kept can be relied on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from bpf import compiler, extras, kept, syscalls
from bpf.attachment import Outcome, attach_programs, detach_programs
from bpf.bytecode import Bytecode, Program
from bpf.errors import CompileFailed, LibraryMissing
from bpf.hooks import HOOKS, ITERATOR_HOOK, MESSAGE_HOOK
from bpf.loader import Refused
from bpf.loading import try_each
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tracing import deaths_told
from installer.scratch import scratch_pins as scratch_directory
from tests.datapath.test_loading import HELPER, REFUSED_PROGRAM
from tests.datapath.wires import scratch_pins
from tests.lab.node import REPOSITORY
from tests.lab.sources import changed_copy

# the verifier refuses it: r0 has no value at the end
NONSENSE = bytes([0x95]) + bytes(7)


@dataclass(frozen=True)
class Compiled:
    """A directory with bytecode, and what the kernel says of programs and maps when they have just been compiled."""

    where: Path
    loaded: dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    where = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch, scratch_pins() as node:
        patch.setenv(kept.VARIABLE, str(where))
        return Compiled(where, attach(node))


@pytest.fixture
def bytecode(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of this test's own, in which the programs' bytecode is kept already."""
    where = tmp_path / "bytecode"
    shutil.copytree(compiled.where, where)
    monkeypatch.setenv(kept.VARIABLE, str(where))
    return where


@pytest.fixture
def node() -> Iterator[tuple[Pins, Path]]:
    with scratch_pins() as made:
        yield made


@pytest.fixture
def without_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on, bcc cannot be imported by new processes."""
    (tmp_path / "modules" / "bcc").mkdir(parents=True)
    (tmp_path / "modules" / "bcc" / "__init__.py").write_text("raise ImportError('no bcc here')\n")
    return lambda: monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))


def attach(node: tuple[Pins, Path]) -> dict[str, Any]:
    """Attach afresh; what the kernel says of all programs and maps then."""
    pins, cgroup = node
    detach_programs(pins)
    assert attach_programs(pins, cgroup) is Outcome.ATTACHED
    found: dict[str, Any] = {}
    for path in sorted(pins.programs.iterdir()):
        with Descriptor(syscalls.open_pin(path)) as opened:
            program = syscalls.program_info(opened.fd)
            found[path.name] = program.type, program.name, bytes(program.tag), program.xlated_len, program.map_count
    for path in sorted(pins.maps.iterdir()):
        with Descriptor(syscalls.open_pin(path)) as opened:
            info = syscalls.map_info(opened.fd)
            sizes = info.key_size, info.value_size, info.max_entries, info.map_flags
            found[path.name] = info.type, info.name, *sizes, info.btf_key_type_id, info.btf_value_type_id
    return found


def only(bytecode: Path) -> Path:
    (path,) = bytecode.iterdir()
    return path


def test_a_second_attach_loads_the_same_without_a_compiler(
    node: tuple[Pins, Path], bytecode: Path, compiled: Compiled, without_bcc: Callable[[], None]
) -> None:
    assert {*(hook.name for hook in HOOKS), MESSAGE_HOOK.name, ITERATOR_HOOK.name} < compiled.loaded.keys()
    without_bcc()
    with capture_logs() as logged:
        assert attach(node) == compiled.loaded
    assert logged == []
    only(bytecode).unlink()
    with pytest.raises(LibraryMissing, match="bcc is not there"):
        attach(node)


def test_a_trace_and_a_probe_need_no_compiler_either(
    node: tuple[Pins, Path], bytecode: Path, without_bcc: Callable[[], None]
) -> None:
    pins, _ = node

    def trace_and_probe() -> Refused:
        with deaths_told(pins):
            pass
        with scratch_directory(pins.bpffs) as directory:
            return try_each(directory)

    attach(node)
    assert trace_and_probe() == Refused({}, {})
    without_bcc()
    assert trace_and_probe() == Refused({}, {})


def test_other_sources_are_compiled_and_kept_beside(
    node: tuple[Pins, Path], bytecode: Path, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = only(bytecode)
    tree = changed_copy(tmp_path / "changed", "maps.h", "0x7f400000 /*", "0x7fc00000 /*")
    monkeypatch.setattr(compiler, "HERE", tree / "bpf")
    changed = attach(node)
    assert {name for name, loaded in compiled.loaded.items() if loaded != changed[name]} >= {"connect4"}
    assert len(list(bytecode.iterdir())) == 2
    assert first.exists()


def test_another_header_or_flag_or_extra_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(macros: str = "") -> str:
        return compiler.name_of_bytecode(compiler.SOURCES, macros, HOOKS)

    tree = changed_copy(tmp_path, "uapi/include/linux/types.h", "#ifndef", "\n#ifndef") / "bpf"
    names = [name(), name("#define CALLER\n"), compiler.name_of_bytecode(compiler.SOURCES, "", HOOKS[1:])]
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "HERE", tree)
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_FLAGS", ())
        names.append(name())
    assert len(set(names)) == len(names)
    assert name() == names[0]


def test_code_of_another_compiler_is_not_used(
    node: tuple[Pins, Path], bytecode: Path, without_bcc: Callable[[], None]
) -> None:
    path = only(bytecode)
    content = kept.find(bytecode, path.name)
    assert content is not None
    found = json.loads(content)
    assert any("libbcc.so" in name for name in found["compiler"])
    assert any("libLLVM" in name for name in found["compiler"])
    for name, (size, time) in found["compiler"].items():
        found["compiler"] = found["compiler"] | {name: (size, time + 1)}
    kept.keep(bytecode, path.name, json.dumps(found).encode())
    attach(node)
    assert kept.find(bytecode, path.name) == content
    kept.keep(bytecode, path.name, json.dumps(found).encode())
    without_bcc()
    with pytest.raises(LibraryMissing):
        attach(node)


def test_kept_code_that_the_kernel_refuses_is_compiled_afresh(
    node: tuple[Pins, Path], bytecode: Path, compiled: Compiled
) -> None:
    path = only(bytecode)
    content = kept.find(bytecode, path.name)
    assert content is not None
    whole = Bytecode.unpacked(content)
    programs = {**whole.programs, "sockops": Program(NONSENSE, ())}
    kept.keep(bytecode, path.name, Bytecode(whole.maps, programs, whole.types, whole.compiler).packed())
    with capture_logs() as logged:
        assert attach(node) == compiled.loaded
    assert logged == [
        {
            "event": "bytecode.refused",
            "why": "bpf_prog_load(ss_sockops): Permission denied",
            "instead": "the programs were compiled",
            "log_level": "warning",
        }
    ]
    assert kept.find(bytecode, path.name) == content


def test_of_a_program_that_the_kernel_refuses_the_verifiers_words_are_told_every_time(
    node: tuple[Pins, Path], bytecode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "HERE", changed_copy(tmp_path / "changed", *REFUSED_PROGRAM) / "bpf")
    monkeypatch.setenv(extras.VARIABLE, "acceleration,iterator")  # without them, nothing else is tried first
    pins, cgroup = node
    for _ in range(2):
        with pytest.raises(CompileFailed) as failed:
            attach_programs(pins, cgroup)
        assert re.search(rf"\n\d+: .* call bpf_get_netns_cookie#122 *\n{HELPER}\n", str(failed.value))
        assert str(failed.value).endswith("\nbpf_prog_load(ss_sk_lookup): Invalid argument")
        assert list(bytecode.iterdir())
        assert not pins.top.exists()


def belong_to_nobody(path: Path) -> None:
    os.chown(path, 65534, 65534)


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.claim("the directory and each file must belong to root, and nobody else may write to them")
@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (belong_to_nobody, "belongs to uid 65534; it must belong to root"),
        (open_to_all, "has mode 0666; nobody but root may write to it"),
        (cut, "is damaged"),
    ],
)
def test_a_file_that_is_not_ours_or_damaged_is_replaced(
    node: tuple[Pins, Path],
    bytecode: Path,
    compiled: Compiled,
    without_bcc: Callable[[], None],
    harm: Callable[[Path], None],
    why: str,
) -> None:
    path = only(bytecode)
    harm(path)
    with capture_logs() as logged:
        assert attach(node) == compiled.loaded
    assert [(each["event"], each["why"]) for each in logged] == [("bytecode.ignored", f"{path} {why}")]
    without_bcc()
    assert attach(node) == compiled.loaded


@pytest.mark.claim("the directory and each file must belong to root, and nobody else may write to them")
@pytest.mark.parametrize("harm", [belong_to_nobody, open_to_all])
def test_a_directory_that_others_may_write_to_is_neither_believed_nor_written_to(
    node: tuple[Pins, Path], bytecode: Path, without_bcc: Callable[[], None], harm: Callable[[Path], None]
) -> None:
    path = only(bytecode)
    before = path.stat()
    harm(bytecode)
    with capture_logs() as logged:
        attach(node)
    ((event, why),) = [(each["event"], each["why"]) for each in logged]
    assert event == "bytecode.ignored"
    assert why.startswith(f"{bytecode} ")
    assert path.stat() == before
    without_bcc()
    with pytest.raises(LibraryMissing):
        attach(node)


def test_where_nothing_can_be_kept_it_is_compiled_and_said(
    node: tuple[Pins, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for where, event, why in (
        (tmp_path / "file" / "bytecode", "bytecode.ignored", f"{tmp_path}/file/bytecode: Not a directory"),
        (Path("/proc/bytecode"), "bytecode.not_kept", "/proc/bytecode: No such file or directory"),
    ):
        monkeypatch.setenv(kept.VARIABLE, str(where))
        with capture_logs() as logged:
            attach(node)
        assert [(each["event"], each["why"]) for each in logged] == [(event, why)]


def test_a_command_says_it_on_standard_error(node: tuple[Pins, Path], bytecode: Path) -> None:
    pins, cgroup = node
    cut(only(bytecode))
    argv = [
        sys.executable,
        "-m",
        "installer",
        "attach",
        "--bpffs",
        str(pins.bpffs),
        "--cgroup",
        str(cgroup),
        "--output",
        "json",
    ]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["outcome"] == "attached"
    assert done.stderr.count("\n") == 1
    assert f"{only(bytecode)} is damaged" in done.stderr


def test_a_relative_directory_is_told_in_one_line(node: tuple[Pins, Path]) -> None:
    pins, cgroup = node
    argv = [sys.executable, "-m", "installer", "attach", "--bpffs", str(pins.bpffs), "--cgroup", str(cgroup)]
    environment = os.environ | {kept.VARIABLE: "build"}
    done = subprocess.run(argv, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f'sidestep: {kept.VARIABLE}: "build" is not an absolute path')
    assert done.stderr.count("\n") == 1
