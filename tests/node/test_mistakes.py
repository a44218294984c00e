"""Mistakes that it takes a node to make: each command says what is wrong, and what would be right, in one line.

Those of the command line itself are in tests/unit/test_cli_mistakes.py.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf.pins import LAYOUT
from tests.lab.invocation import REPOSITORY, sidestep
from tests.lab.node import Node

# the least that each command needs beside its options
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "accelerate": ("off",),
    "explain": ("alpha", "192.0.2.1:80"),
    "report": ("--seconds", "0.1"),
    "trace": ("--seconds", "0.1"),
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod("alpha", envoy=False, app=False, annotations={"sidestep.io/deny-outbound-ports": "25"})
        yield made


def line(done: "subprocess.CompletedProcess[str]", status: int = 1) -> str:
    """The one line that is said."""
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith("sidestep: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("sidestep: ").rstrip()


@pytest.mark.parametrize("command", ["attach", "detach", "accelerate", "maps", "trace"])
@pytest.mark.parametrize("there", [True, False], ids=["no-bpffs", "not-there"])
def test_no_bpffs(command: str, there: bool, tmp_path: Path) -> None:
    place = tmp_path if there else tmp_path / "never"
    said = line(sidestep(command, "--bpffs", place, *ARGUMENTS.get(command, ())))
    how = f"mount -t bpf bpf {place}"
    wanted = (
        f"is not a bpffs; mount one: {how}" if there else f"does not exist; make a bpffs: mkdir -p {place} && {how}"
    )
    assert said == f"{place} {wanted}"


def test_an_agent_without_pods_is_told_how_to_get_them() -> None:
    assert "nowhere to get Pods from; give --pods DIR" in line(sidestep("agent"))


@pytest.mark.parametrize("command", ["accelerate", "maps", "trace"])
def test_nothing_attached(command: str, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    try:
        said = line(sidestep(command, "--bpffs", tmp_path, *ARGUMENTS.get(command, ())))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    how = "run `sidestep attach` (or start the agent), or give the --bpffs that `sidestep attach` was given"
    assert said == f"nothing is attached: {tmp_path}/sidestep/{LAYOUT} is not there; {how}"


@pytest.mark.parametrize(
    "argv",
    [
        ("pods", "nobody"),
        ("explain", "nobody", "192.0.2.1:80"),
        ("maps", "--pod", "nobody"),
        ("deny", "nobody"),
        ("trace", "nobody"),
    ],
    ids=" ".join,
)
def test_an_unknown_pod(node: Node, argv: tuple[str, ...]) -> None:
    said = line(sidestep(argv[0], "--bpffs", node.bpffs, *argv[1:]))
    assert said == "no enrolled pod is called nobody; enrolled pods: default/alpha"


def without(node: Node, *argv: str) -> "subprocess.CompletedProcess[str]":
    """As root in a container that was given no capabilities."""
    dropped = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [sys.executable, "-m", "installer", argv[0], "--bpffs", str(node.bpffs), *argv[1:]]
    return subprocess.run([*dropped, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "argv",
    [
        ("deny", "--kill"),
        ("explain", "alpha", "192.0.2.1:80", "--try"),
    ],
    ids=" ".join,
)
def test_root_without_capabilities_is_told_which(node: Node, argv: tuple[str, ...]) -> None:
    done = without(node, *argv)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    assert "CAP_SYS_ADMIN" in done.stderr
    assert "run as root with all capabilities" in done.stderr
    assert "--proc" not in done.stderr


def test_status_without_capabilities_does_not_know_where_processes_are(node: Node) -> None:
    node.pod("beta", envoy=False)
    done = without(node, "status")
    assert (done.returncode, done.stderr) == (1, "")  # as no proxy listens either
    assert "? processes: stray processes: unknown: without CAP_SYS_PTRACE" in done.stdout


@pytest.mark.parametrize("command", ["deny", "explain", "maps", "pods", "report"])
def test_looking_takes_none(node: Node, command: str) -> None:
    done = without(node, command, *ARGUMENTS.get(command, ()))
    assert (done.returncode, done.stderr) == (0, "")
