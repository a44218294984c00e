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
OF_ATTACH = "the --bpffs that `sidestep attach` was given"
ATTACH = f"run `sidestep attach` (or start the agent), or give {OF_ATTACH}"
AT_DEFAULT = "give /sys/fs/bpf, the default: sidestep's pins are there"


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


def with_default(*mount: object) -> tuple[str, ...]:
    """What runs a command in a view of the machine of its own, with something else mounted at the default place."""
    return "unshare", "--mount", "sh", "-c", 'mount $0 /sys/fs/bpf && exec "$@"', " ".join(map(str, mount))


@pytest.mark.parametrize("command", ["attach", "detach", "accelerate", "maps", "trace"])
@pytest.mark.parametrize("there", [True, False], ids=["no-bpffs", "not-there"])
def test_no_bpffs(command: str, there: bool, tmp_path: Path, node: Node) -> None:
    place = tmp_path if there else tmp_path / "never"
    asked = (command, "--bpffs", place, *ARGUMENTS.get(command, ()))
    wrong = f"--bpffs {place} {'is not a bpffs' if there else 'does not exist'}"
    said = line(sidestep(*asked, through=with_default("-t", "bpf", "bpf")))
    if command == "attach":
        make = "" if there else f"mkdir -p {place} && "
        how = f"mount one: {make}mount -t bpf bpf {place}, or give /sys/fs/bpf, the default"
    else:
        how = f"give {OF_ATTACH} (default: /sys/fs/bpf, which has no pins either)"
    assert said == f"{wrong}; {how}"
    said = line(sidestep(*asked, through=with_default("--bind", node.bpffs)))
    assert said == f"{wrong}; {AT_DEFAULT}"


def test_an_agent_without_pods_is_told_how_to_get_them() -> None:
    assert "nowhere to get Pods from; give --pods DIR" in line(sidestep("agent"))


@pytest.mark.parametrize("command", ["accelerate", "maps", "trace"])
def test_nothing_attached(command: str, tmp_path: Path, node: Node) -> None:
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    asked = (command, "--bpffs", tmp_path, *ARGUMENTS.get(command, ()))
    try:
        without = line(sidestep(*asked, through=with_default("-t", "bpf", "bpf")))
        elsewhere = line(sidestep(*asked, through=with_default("--bind", node.bpffs)))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    wrong = f"nothing is attached: --bpffs {tmp_path} has no {tmp_path}/sidestep/{LAYOUT}"
    assert without == f"{wrong}; {ATTACH} (default: /sys/fs/bpf, which has no pins either)"
    assert elsewhere == f"{wrong}; {AT_DEFAULT}"


def test_nothing_attached_at_the_default_place() -> None:
    said = line(sidestep("maps", through=with_default("-t", "bpf", "bpf")))
    assert said == f"nothing is attached: --bpffs /sys/fs/bpf has no /sys/fs/bpf/sidestep/{LAYOUT}; {ATTACH}"
    said = line(sidestep("maps", through=with_default("-t", "tmpfs", "tmpfs")))
    assert said == "--bpffs /sys/fs/bpf is not a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf"


def test_status_says_where_the_pins_are_even_if_no_agent_answers(tmp_path: Path, node: Node) -> None:
    asked = ("status", "--bpffs", tmp_path, "--cni-agent-run-dir", tmp_path)
    done = sidestep(*asked, through=with_default("--bind", node.bpffs))
    assert done.returncode == 1
    assert f"✗ programs: --bpffs {tmp_path} is not a bpffs\n  → {AT_DEFAULT}\n" in done.stdout


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
