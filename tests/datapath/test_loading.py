"""Every program and map by itself: what the kernel refuses of them is named, with the verifier's last line."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf import compiler
from bpf.errors import CompileFailed
from bpf.hooks import HOOKS
from bpf.layout import STORAGES, TABLES
from bpf.loader import NOT_PERMITTED, Refused
from bpf.loading import try_each
from installer.probe.loading import loading, map_kinds
from installer.scratch import scratch_pins
from installer.settings import Attachment
from tests.lab.node import REPOSITORY
from tests.lab.sources import changed_copy

# a helper that this type of program never had; a trie that is not told to allocate its entries as they come
REFUSED_PROGRAM = (
    "lookup.c",
    "    local = ADDRESS_OF(ctx, local, ctx->family);",
    "    local.word[0] = bpf_get_netns_cookie(ctx);",
)
REFUSED_MAP = "maps.h", "routes, MAX_ROUTES, NO_PREALLOC)", "routes, MAX_ROUTES, 0)"
MAPS = {*TABLES, *STORAGES}
HELPER = "program of this type cannot use helper bpf_get_netns_cookie#122"

Change = Callable[[tuple[str, str, str]], None]


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bpffs"
    path.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", path], check=True)
    try:
        yield path
        assert not [each for each in path.iterdir() if each.is_dir()]
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """Have the child compile other sources."""

    def change(what: tuple[str, str, str]) -> None:
        monkeypatch.setattr(compiler, "HERE", changed_copy(tmp_path / "changed", *what) / "bpf")

    return change


def tried(bpffs: Path) -> Refused:
    with scratch_pins(bpffs) as directory:
        return try_each(directory)


def test_a_kernel_that_can_capture_takes_them_all(bpffs: Path) -> None:
    assert tried(bpffs) == Refused({}, {})
    (row,) = loading(Attachment(bpffs))
    assert (row.verdict, row.found) == ("yes", f"{len(HOOKS)} programs and {len(MAPS)} maps, compiled and loaded")
    assert set(map_kinds()) == MAPS


def test_a_refused_helper_is_named_and_the_other_programs_are_tried(bpffs: Path, change: Change) -> None:
    change(REFUSED_PROGRAM)
    assert tried(bpffs) == Refused({}, {"sk_lookup": HELPER})
    (row,) = loading(Attachment(bpffs))
    assert (row.what, row.needed_by, row.found, row.verdict) == ("sk_lookup", "inbound capture", HELPER, "no")
    assert row.advice.startswith("use a kernel that has it: Linux 5.9 or newer (5.15 for all of sidestep)")


def test_a_map_that_cannot_be_made_is_named_and_the_programs_are_unknown(bpffs: Path, change: Change) -> None:
    change(REFUSED_MAP)
    assert tried(bpffs) == Refused({"routes": "Invalid argument"}, {})
    refused, programs = loading(Attachment(bpffs))
    assert (refused.what, refused.found, refused.verdict) == ("map: lpm_trie", "routes: Invalid argument", "no")
    assert (programs.what, programs.verdict) == ("programs and maps", "unknown")


def test_sources_that_do_not_compile_are_told_by_their_line(bpffs: Path, change: Change) -> None:
    change(("bind.c", "int ss_post_bind4(", "integer ss_post_bind4("))
    lines = (REPOSITORY / "bpf" / "bind.c").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.startswith("int ss_post_bind4("))
    with pytest.raises(CompileFailed, match=rf"^bpf/bind\.c:{line}:1: error: unknown type name 'integer'"):
        tried(bpffs)
    (row,) = loading(Attachment(bpffs))
    assert (row.what, row.verdict) == ("programs and maps", "no")


def test_what_this_process_may_not_do_says_nothing_of_the_kernel(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = ("setpriv", "--bounding-set=-all,+dac_override", "--inh-caps=-all")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **options: run([*nothing, *argv], **options))
    assert list(tried(bpffs).maps.values()) == [NOT_PERMITTED]
    (row,) = loading(Attachment(bpffs))
    assert (row.verdict, row.found) == ("unknown", "not permitted to try")
