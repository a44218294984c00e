"""Processes of a namespace are found with their cgroups, however they were started and from wherever one looks."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bpf.kernel import cgroup2_root
from cni.netns.namespaces import PROC
from cni.netns.residents import Resident, name_of, residents
from tests.datapath.bare import bare_pods
from tests.datapath.wires import scratch_pins
from tests.lab.inside import PYTHON, popen
from tests.lab.waiting import wait_until

ROOT = Path(__file__).parents[2]
_SYS_EXIT = 60 if os.uname().machine == "x86_64" else 93  # asm/unistd.h: ends a thread, where exit_group ends all


@pytest.fixture
def netns() -> Iterator[Path]:
    with bare_pods() as make:
        (pod,) = make(1)
        yield pod.path


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """With two below it."""
    with scratch_pins() as (_, top):
        made = [top / "first", top / "second"]
        for each in made:
            each.mkdir()
        yield top
        for each in made:
            each.rmdir()


def found(netns: Path) -> list[Resident]:
    seen = residents(PROC, [netns.stat().st_ino])
    assert seen.unknown == ""
    return seen.found.get(netns.stat().st_ino, [])


@contextmanager
def running(netns: Path, cgroup: Path, code: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has run the code and then waits; it says when."""
    process = popen(netns, cgroup, [*PYTHON, code], 0, 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


WAITING = "print('ready', flush=True); input()"


def test_a_process_is_found_with_its_cgroup_and_all_above_it(netns: Path, cgroup: Path) -> None:
    with running(netns, cgroup / "first", WAITING) as process:
        (one,) = found(netns)
        assert (one.pid, one.cgroup.directory) == (process.pid, cgroup / "first")
        assert one.cgroup.path == f"/{cgroup.name}/first"
        assert one.cgroup.lineage == {each.stat().st_ino for each in (cgroup / "first", cgroup, cgroup2_root())}
        (cgroup / "second" / "cgroup.procs").write_text(str(process.pid))
        assert found(netns)[0].cgroup.directory == cgroup / "second"
    assert found(netns) == []


def test_a_name_is_told_in_letters_that_print(netns: Path, cgroup: Path) -> None:
    code = f"import ctypes; ctypes.CDLL(None).prctl(15, b'a\\nb\\x1b[1m'); {WAITING}"
    with running(netns, cgroup / "first", code):
        (one,) = found(netns)
        assert name_of(PROC, one) == "a?b?[1m"
    assert name_of(PROC, one) is None


def test_a_process_lives_on_without_its_first_thread_and_a_zombie_does_not(netns: Path, cgroup: Path) -> None:
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); "
        f"print('ready', flush=True); ctypes.CDLL(None).syscall({_SYS_EXIT}, 0)"
    )
    with running(netns, cgroup / "first", code) as process:
        state = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", "its first thread to end")
        assert [each.pid for each in found(netns)] == [process.pid]
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert found(netns) == []


def test_processes_that_come_and_go_leave_nothing_unknown(netns: Path, cgroup: Path) -> None:
    stopping = threading.Event()

    def churn() -> None:
        while not stopping.is_set():
            with suppress(subprocess.TimeoutExpired):
                popen(netns, cgroup / "first", ["true"], 0, 0).wait(5)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert {each.cgroup.directory for each in found(netns)} <= {cgroup / "first", *_own_cgroups()}
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def _own_cgroups() -> set[Path]:
    """Where a child of this process is before it has joined another."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return {cgroup2_root() / line.removeprefix("0::/") for line in lines if line.startswith("0::")}


LOOKING = """
import json, sys
from pathlib import Path
from cni.netns.residents import residents
seen = residents(Path("/proc"), [int(sys.argv[1])])
print(json.dumps([seen.unknown, *([each.cgroup.path, sorted(each.cgroup.lineage)]
                                  for each in seen.found.get(int(sys.argv[1]), []))]))
"""


@pytest.mark.parametrize("has_own_processes", [True, False])
def test_a_cgroup_namespace_hides_nothing(netns: Path, cgroup: Path, has_own_processes: bool) -> None:
    """As in a container with the node's processes and cgroups; and as where its first process can be looked at."""
    inside = f'echo $$ > {cgroup}/second/cgroup.procs && exec unshare --cgroup {sys.executable} -c "$0" "$@"'
    with running(netns, cgroup / "first", WAITING):
        expected = [f"/{cgroup.name}/first", sorted(found(netns)[0].cgroup.lineage)]
    own = ["unshare", "--pid", "--fork", "--mount-proc"] if has_own_processes else []
    starting = f"nsenter --net={netns} sh -c 'echo $$ > {cgroup}/first/cgroup.procs; exec sleep 60' & "
    argv = [*own, "sh", "-c", f"{starting} sleep 0.5; ({inside}); kill $!; wait", LOOKING, str(netns.stat().st_ino)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout) == ["", expected], done.stderr
