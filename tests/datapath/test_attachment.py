"""Starting again: nothing to do, programs to swap, or leftovers to clear away."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import attachment, compiler, syscalls
from bpf.acceleration import is_possible
from bpf.attachment import Outcome, attach_programs, is_attached, is_deciding
from bpf.errors import CompileFailed, KernelRefused, NotAttached
from bpf.hooks import CGROUP_HOOKS
from bpf.layout import STORAGES, TABLES, Cookie, OwnAddressEntry
from bpf.layouts import layouts
from bpf.pins import LAYOUT, Pins
from bpf.syscalls import Descriptor
from tests.datapath.wires import Wire, scratch_pins
from tests.lab.inside import PYTHON


def test_the_same_sources_neither_load_nor_attach(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "load_and_pin", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(attachment, "_create_cgroup_link", lambda *_: pytest.fail("attached"))
    assert attach_programs(wire.kernel.pins, wire.kernel.cgroup) is Outcome.UNCHANGED


def test_changed_sources_swap_the_programs_under_live_connections(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.mesh()
    code = """
import json, socket, sys
s = socket.create_connection((sys.argv[1], 8080))
lines = s.makefile()
lines.readline()
print("ready", flush=True)
sys.stdin.readline()
s.sendall(b"x")
print(json.dumps([json.loads(lines.readline()), s.getpeername()]), flush=True)
"""
    client = wire.pod.start([*PYTHON, code, str(wire.peer.ip4)], 1000)
    monkeypatch.setattr(attachment, "sources_digest", lambda: bytes(32))
    assert attach_programs(wire.kernel.pins, wire.kernel.cgroup) is Outcome.SWAPPED
    monkeypatch.undo()
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write("go on\n")
    client.stdin.flush()
    seen, peer = json.loads(client.stdout.readline())
    assert seen["who"] == "outbound"
    assert seen["original"] == peer == [str(wire.peer.ip4), 8080]
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert wire.peer.dial(wire.pod.ip4, 8080)["who"] == "inbound"
    assert attach_programs(wire.kernel.pins, wire.kernel.cgroup) is Outcome.SWAPPED


def test_an_older_versions_pairings_are_made_anew(tmp_path: Path) -> None:
    older = tmp_path / "older"
    for package in ("bpf", "cni", "installer"):
        source = compiler.HERE.parent / package
        shutil.copytree(source, older / package, ignore=shutil.ignore_patterns("__pycache__"))
    maps = older / "bpf" / "maps.h"
    head, last, tail = maps.read_text().rpartition("    __u64 marks;\n")
    maps.write_text(head + last + "    __u64 more[2];\n" + tail)
    with scratch_pins() as (pins, cgroup):
        argv = [sys.executable, "-m", "installer", "attach", "--bpffs", str(pins.bpffs), "--cgroup", str(cgroup)]
        subprocess.run(argv, cwd=older, check=True, capture_output=True, timeout=120)
        assert attach_programs(pins, cgroup) is Outcome.BESIDE
        attachment.retire_others(pins)
        assert layouts(pins) == [pins.root]
        assert pins.has_values("pairings", STORAGES["pairings"])
        assert is_possible(pins)
        assert is_attached(pins)


def test_programs_that_do_not_compile_leave_the_old_ones_in_place(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wire.mesh()
    broken = tmp_path / "bpf"
    broken.mkdir()
    for source in compiler.HERE.glob("*.[ch]"):
        (broken / source.name).write_text(source.read_text())
    for source in compiler.HERE.glob("*.py"):
        (broken / source.name).write_text(source.read_text())
    (broken / "uapi").symlink_to(compiler.HERE / "uapi")
    (broken / "connect.c").write_text("int ss_connect4(struct bpf_sock_addr *ctx) { return nonsense; }\n")
    monkeypatch.setattr(compiler, "HERE", broken)
    with pytest.raises(CompileFailed, match="nonsense"):
        attach_programs(wire.kernel.pins, wire.kernel.cgroup)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert sorted(path.name for path in wire.kernel.pins.top.iterdir()) == [LAYOUT]


def test_what_an_interrupted_attach_left_is_cleared_away(wire: Wire) -> None:
    leftover = wire.kernel.pins.top / "new-1"
    (leftover / "links").mkdir(parents=True)
    attach_programs(wire.kernel.pins, wire.kernel.cgroup)
    assert not leftover.exists()


def test_a_directory_that_is_no_bpffs_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelRefused, match=f"{tmp_path} is not a bpffs; mount one"):
        attach_programs(Pins(tmp_path), tmp_path)


def test_a_directory_that_is_no_cgroup2_is_named_and_nothing_is_left(wire: Wire, tmp_path: Path) -> None:
    other = Pins(wire.kernel.pins.bpffs / "other")
    with pytest.raises(KernelRefused, match="does not exist; mount one: mkdir -p"):
        attach_programs(other, tmp_path)
    with pytest.raises(KernelRefused, match="give a cgroup2 directory"):
        attach_programs(wire.kernel.pins, tmp_path)
    assert attach_programs(wire.kernel.pins, wire.kernel.cgroup) in (Outcome.UNCHANGED, Outcome.SWAPPED)


@pytest.mark.claim("the pods' cgroup is made anew")
def test_links_of_a_cgroup_that_went_and_came_back_are_made_anew() -> None:
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        cgroup.rmdir()
        cgroup.mkdir()
        assert not is_attached(pins)
        assert not is_deciding(pins)
        assert attach_programs(pins, cgroup) is Outcome.SWAPPED
        assert is_attached(pins)
        assert is_deciding(pins)
        assert attach_programs(pins, cgroup) is Outcome.UNCHANGED


def test_programs_go_on_deciding_while_it_is_not_recorded_where() -> None:
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        (pins.maps / "build").unlink()
        assert not is_attached(pins)
        assert is_deciding(pins)
        (pins.links / "sendmsg6").unlink()
        assert not is_deciding(pins)


def test_links_move_to_another_cgroup() -> None:
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        inner = cgroup / "inner"
        inner.mkdir()
        assert attach_programs(pins, inner) is Outcome.SWAPPED
        assert attach_programs(pins, inner) is Outcome.UNCHANGED
        assert is_deciding(pins)
        inner.rmdir()
        assert not is_attached(pins)
        assert not is_deciding(pins)


def test_a_connection_passes_two_copies_of_the_programs_as_one(wire: Wire) -> None:
    """As while links move, or two versions are attached one inside of the other."""
    wire.mesh()
    inner = wire.kernel.cgroup / "inner"
    inner.mkdir()
    try:
        made = [(hook, Descriptor(syscalls.open_pin(wire.kernel.pins.programs / hook.name))) for hook in CGROUP_HOOKS]
        inside = [Descriptor(attachment._create_cgroup_link(each.fd, inner, hook.attach_type)) for hook, each in made]
        twice = replace(wire.pod, cgroup=inner, started=[])
        for ip in (wire.peer.ip4, wire.peer.ip6):
            seen = twice.dial(ip, 8080)
            assert (seen["who"], seen["original"]) == ("outbound", [str(ip), 8080])
            assert seen["client_peer"] == [str(ip), 8080]
        for each in [*inside, *(each for _, each in made)]:
            each.close()
    finally:
        inner.rmdir()


def test_tables_of_another_shape_are_refused(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "pods", (Cookie, OwnAddressEntry))
    with pytest.raises(NotAttached, match=r"pods has key and value of .* use that version's command"):
        wire.kernel.pins.open_map("pods")


def test_whoever_attaches_over_tables_of_another_shape_is_told_to_detach(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLES, "build", (Cookie, OwnAddressEntry))
    with pytest.raises(NotAttached, match=r"build has key and value of .*; run `sidestep detach` and start again"):
        attach_programs(wire.kernel.pins, wire.kernel.cgroup)
