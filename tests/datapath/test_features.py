"""The trials see what a kernel lacks: programs that do nothing, helpers that are refused, places that can't be used."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bpf.errors import KernelRefused
from bpf.hooks import HOOKS
from bpf.kernel import cgroup2_root, own_cgroup
from bpf.probing import exercise, features, loading, scratch
from bpf.probing.features import MAPS, OTHERS, Feature, Presence, try_features
from bpf.probing.instructions import call
from bpf.probing.scratch import PREFIX, scratch_cgroup
from bpf.probing.trials import Trial, TrialTables, idle, trials
from tests.lab.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def place() -> Iterator[Path]:
    """A cgroup of the test's own."""
    with scratch_cgroup(cgroup2_root()) as path:
        yield path


def verdicts(found: list[Feature]) -> dict[str, Presence]:
    return {each.name: each.verdict for each in found}


def test_a_kernel_that_can_capture_passes_every_trial_and_keeps_nothing(place: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    found = try_features([place])
    assert verdicts(found) == dict.fromkeys([*MAPS, *(hook.name for hook in HOOKS), *OTHERS], Presence.YES)
    assert [each for each in place.iterdir() if each.is_dir()] == []
    assert len(set(Path("/proc/self/fd").iterdir())) == len(before)


@pytest.mark.parametrize("name", [hook.name for hook in HOOKS])
def test_a_program_that_loads_and_does_nothing_is_a_no(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trial.program
    monkeypatch.setattr(Trial, "program", lambda trial: idle() if trial.hook.name == name else whole(trial))
    found = {each.name: each for each in try_features([place])}
    assert found[name].verdict is Presence.NO
    assert found[name].found.startswith("does not act: ")


def test_a_refused_helper_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_helper_of_another_kind(tables: TrialTables) -> list[Trial]:
        made = trials(tables)
        for trial in made:
            if trial.hook.name == "getsockopt":
                trial.parts["bpf_redirect"] = call(23)  # type: ignore[index]
        return made

    monkeypatch.setattr(features, "trials", with_a_helper_of_another_kind)
    found = {each.name: each for each in try_features([place])}
    assert found["getsockopt"].verdict is Presence.NO
    assert found["getsockopt"].found.startswith("without bpf_redirect: bpf_prog_load(")
    assert found["connect4"].verdict is Presence.YES


@pytest.mark.parametrize("kind", [loading.SOCKHASH, loading.LPM_TRIE])
def test_a_map_that_cannot_be_made_is_a_no(place: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = loading.create_map

    def refuse(of: int, *rest: object) -> int:
        return make(999 if of == kind else of, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "create_map", refuse)
    found = verdicts(try_features([place]))
    name = "sockhash" if kind == loading.SOCKHASH else "lpm_trie"
    assert found[name] is Presence.NO
    assert found["connect4"] is (Presence.UNKNOWN if name == "sockhash" else Presence.YES)


def test_without_a_cgroup_programs_are_loaded_and_nothing_is_known(tmp_path: Path) -> None:
    for places in ([], [tmp_path / "missing"]):
        found = verdicts(try_features(places))
        assert found["hash"] is Presence.YES
        assert found["connect4"] is found["bpf_link"] is Presence.UNKNOWN


def test_where_ipv6_is_off_the_rest_is_tried(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "_has_ipv6", lambda: False)
    found = {each.name: each for each in try_features([place])}
    assert {each.verdict for each in found.values()} == {Presence.YES}
    assert found["connect6"].found == "loads; IPv6 is off, so there is nothing to try"
    assert found["sk_lookup"].found == "loads, acts"


def test_a_place_that_cannot_be_used_gives_way_to_the_next(place: Path, tmp_path: Path) -> None:
    """As in a container, whose process can't be moved out of its own cgroup."""
    assert set(verdicts(try_features([tmp_path / "missing", place])).values()) == {Presence.YES}


def test_the_own_cgroup_is_found_by_looking_where_the_path_does_not_say(place: Path) -> None:
    with ExitStack() as undo:
        inner = place / "inner"
        inner.mkdir()
        undo.callback(inner.rmdir)
        code = (
            "import sys; from pathlib import Path; from bpf.kernel import own_cgroup; "
            "open(sys.argv[1] + '/cgroup.procs', 'w').write('0'); print(own_cgroup(Path(sys.argv[2])))"
        )
        told = subprocess.run(
            ["unshare", "-C", sys.executable, "-c", code, str(inner), str(place)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert told.stdout.strip() == str(inner)
    assert own_cgroup(place) is None


def test_a_killed_probe_leaves_no_process_and_the_next_one_clears_its_cgroup(place: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from bpf.probing.scratch import in_child, join_cgroup, scratch_cgroup
def work():
    join_cgroup(cgroup)
    os.write(1, b"%d" % os.getpid())
    time.sleep(60)
with scratch_cgroup(Path(sys.argv[1])) as cgroup:
    in_child(work, 60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(place)], cwd=REPOSITORY, stdout=subprocess.PIPE) as probe:
        assert probe.stdout is not None
        child = int(os.read(probe.stdout.fileno(), 32))
        (left,) = place.glob(f"{PREFIX}*")
        assert str(child) in (left / "cgroup.procs").read_text().split()
        with scratch_cgroup(place):
            assert left.exists()  # it is in use
        probe.send_signal(signal.SIGKILL)
    wait_until(lambda: "populated 0" in (left / "cgroup.events").read_text(), "child gone")
    assert left.exists()
    with scratch_cgroup(place):
        assert not left.exists()


def test_a_child_that_hangs_or_dies_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(KernelRefused, match="ended without a word"):
        scratch.in_child(lambda: os._exit(3), 5)
    with pytest.raises(KernelRefused, match=r"took more than 0\.1 s"):
        scratch.in_child(lambda: signal.pause(), 0.1)
    with pytest.raises(KernelRefused, match=r"^because$"):
        scratch.in_child(lambda: (_ for _ in ()).throw(ValueError("because")).__next__(), 5)
