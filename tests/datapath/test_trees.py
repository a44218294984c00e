"""Where the programs get attached, and what the probe says of it: by the pods that are there, not by names."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bpf.kernel import cgroup2_root
from bpf.pins import Pins
from tests.datapath.wires import scratch_pins
from tests.lab.invocation import sidestep
from tests.lab.ownroot import rooted_at, seen_as
from tests.lab.waiting import wait_until

POD = "pod01234567-89ab-cdef-0123-456789abcdef"
SLICE = "kubepods-burstable-pod01234567_89ab_cdef_0123_456789abcdef.slice"
SECONDS = 180  # a probe compiles and tries everything, on a machine on which much else may be going on
OPTIONS = ("--cni-agent-run-dir", "/run/sidestep", "--output", "json")


@dataclass(frozen=True)
class Machine:
    """A machine whose cgroup2 is this cgroup."""

    pins: Pins
    root: Path
    undo: ExitStack

    def tree(self, *names: str) -> Path:
        """Make cgroups, one below the other; returns the first one's path as the machine sees it."""
        path = self.root
        for name in names:
            path = path / name
            path.mkdir(exist_ok=True)
        return self.seen(names[0])

    def seen(self, name: str) -> Path:
        return seen_as(self.root, self.root / name)

    def run(self, *names: str) -> None:
        """A process in a cgroup."""
        self.tree(*names)
        process = self.undo.enter_context(subprocess.Popen(["sleep", "600"]))
        self.undo.callback(process.kill)
        self.root.joinpath(*names, "cgroup.procs").write_text(str(process.pid))

    def probe(self, *options: str) -> dict[str, str]:
        """The row about the attach point."""
        done = sidestep(
            "probe", "--bpffs", self.pins.bpffs, *OPTIONS, *options, seconds=SECONDS, through=rooted_at(self.root)
        )
        assert done.stderr == ""
        rows: list[dict[str, str]] = json.loads(done.stdout)["rows"]
        return next(each for each in rows if each["what"] == "attach point")

    def attach(self, *options: str) -> dict[str, Any]:
        said = sidestep(
            "attach", "--bpffs", self.pins.bpffs, "--output", "json", *options, through=rooted_at(self.root)
        )
        assert said.returncode == 0, said.stderr
        document: dict[str, Any] = json.loads(said.stdout)
        return document


@contextmanager
def removed(root: Path) -> Iterator[None]:
    """Removes the cgroups below `root` in the end, with whatever a command that was killed has left there."""
    try:
        yield
    finally:
        (root / "cgroup.kill").write_text("1")
        wait_until(lambda: "populated 0" in (root / "cgroup.events").read_text(), f"processes in {root} to end")
        for each in sorted(root.glob("**/"), reverse=True):
            if each != root:
                each.rmdir()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with scratch_pins() as (pins, root), removed(root), ExitStack() as undo:
        yield Machine(pins, root, undo)


def places(document: dict[str, Any]) -> list[str]:
    return [document["attach_point"], *document["further_places"]]


def test_a_left_over_tree_is_passed_over_for_the_one_that_has_pods(machine: Machine) -> None:
    left, used = machine.tree("kubepods"), machine.seen("kubepods.slice")
    machine.run("kubepods.slice", "kubepods-burstable.slice", SLICE)
    told = machine.probe()
    assert told["verdict"] == "yes"
    assert told["found"] == f"{used}, where pods' processes are; left alone, as nothing is there: {left}"
    assert places(machine.attach()) == [str(used)]


def test_a_pods_cgroup_without_processes_tells_the_tree_as_well(machine: Machine) -> None:
    machine.tree("kubepods.slice", "kubepods-burstable.slice")
    used = machine.tree("kubepods", "besteffort", POD)
    assert machine.probe()["found"].startswith(f"{used}, where pods have cgroups; left alone")


@pytest.mark.parametrize(
    "nested",
    [
        ("kubelet.slice", "kubelet-kubepods.slice", "kubelet-kubepods-burstable.slice"),
        ("docker", "1234", "kubelet", "kubepods"),
        ("system.slice", "docker-1234.scope", "kubelet.slice", "kubelet-kubepods.slice"),
        ("k3s", "kubepods"),
    ],
)
def test_every_tree_with_processes_is_attached(machine: Machine, nested: tuple[str, ...]) -> None:
    machine.run("kubepods", "burstable", POD)
    machine.run(*nested, "pod1")
    depth = next(number for number, name in enumerate(nested, 1) if "kubepods" in name)
    wanted = [str(machine.seen("kubepods")), str(machine.seen("/".join(nested[:depth])))]
    told = machine.probe()
    assert (told["verdict"], told["found"]) == ("yes", f"{' and '.join(wanted)}, where pods' processes are")
    assert sorted(places(machine.attach())) == sorted(wanted)
    said = sidestep("status", "--bpffs", machine.pins.bpffs, columns=400, through=rooted_at(machine.root))
    assert f"programs: attached at {' and '.join(wanted)}\n" in said.stdout


def test_trees_without_anything_are_all_attached_and_the_probe_warns(machine: Machine) -> None:
    trees = [str(machine.tree(name)) for name in ("kubepods", "kubepods.slice")]
    told = machine.probe()
    assert told["verdict"] == "warning"
    assert told["found"] == (f"{' and '.join(trees)}, where no pod is yet; no process and no pod's cgroup is there")
    assert places(machine.attach()) == trees


def test_without_a_tree_it_is_the_root(machine: Machine) -> None:
    machine.run("system.slice")
    told = machine.probe()
    assert told["found"] == f"{cgroup2_root()}, the root: kubelet has no cgroup2 there"
    assert places(machine.attach()) == [str(cgroup2_root())]


def test_the_setting_rules_and_the_probe_names_the_pods_elsewhere(machine: Machine) -> None:
    empty, used = machine.tree("kubepods"), machine.seen("kubepods.slice")
    machine.run("kubepods.slice", SLICE)
    told = machine.probe("--cgroup", str(empty))
    assert told["verdict"] == "warning"
    assert f"{empty}, given by --cgroup; no process and no pod's cgroup is there" in told["found"]
    assert f"pods are in {used} too, where nothing will be attached" in told["found"]
    assert places(machine.attach("--cgroup", str(empty))) == [str(empty)]


def test_attaching_again_keeps_the_place_of_running_pods_and_adds_that_of_others(machine: Machine) -> None:
    """The first place stays the first as long as processes are there: moving it would open them for a moment."""
    machine.run("kubepods.slice", SLICE)
    first = machine.attach()
    machine.run("kubepods", POD)
    again = machine.attach()
    wanted = [str(machine.seen(name)) for name in ("kubepods.slice", "kubepods")]
    assert (places(first), first["outcome"]) == (wanted[:1], "attached")
    assert (places(again), again["outcome"]) == (wanted, "extended")
    assert machine.attach()["outcome"] == "unchanged"


def test_a_mount_of_cgroup2_that_is_hidden_is_passed_over(machine: Machine) -> None:
    """As in a container on a hybrid host: what the container has itself is below what the host's mount shows."""
    used = machine.tree("kubepods", POD)
    hide = "mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/host"
    held = f'exec 9< {machine.root}; {hide}; mount --bind /proc/self/fd/9 /sys/fs/cgroup/host; exec "$@"'
    through = ("unshare", "-m", "sh", "-c", held, "sh")
    done = sidestep("probe", "--bpffs", machine.pins.bpffs, *OPTIONS, seconds=SECONDS, through=through)
    rows = {each["what"]: each["found"] for each in json.loads(done.stdout)["rows"]}
    assert rows["cgroup2"] == "at /sys/fs/cgroup/host"
    assert rows["attach point"] == f"/sys/fs/cgroup/host/{used.name}, where pods have cgroups"
