"""Mistakes of users and of machines: each command says what is wrong, and what would be right, in one line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from installer.commands.cli import COMMANDS
from tests.lab.invocation import REPOSITORY, sidestep, sidestep_by_user
from tests.lab.node import Node

# the least that each command needs beside its options
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "accelerate": ("off",),
    "agent": ("--pods", "/"),
    "completion": ("bash",),
    "explain": ("alpha", "192.0.2.1:80"),
    "report": ("--seconds", "0.1"),
    "trace": ("--seconds", "0.1"),
}
NEEDS_NOBODY = ("completion", "probe")
READS_PINS = ("accelerate", "deny", "explain", "maps", "pods", "report", "trace")


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


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_option_that_is_none(command: str) -> None:
    said = line(sidestep(command, *ARGUMENTS.get(command, ()), "--frobnicate"), 2)
    assert said.startswith("No such option")
    assert said.endswith(f"see sidestep {command} --help")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_argument_too_many(command: str) -> None:
    said = line(sidestep(command, *ARGUMENTS.get(command, ()), "one", "two", "three"), 2)
    assert said.startswith("Got unexpected extra argument")
    assert said.endswith(f"; see sidestep {command} --help")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("explain", "alpha", "--inbound", "192.0.2.1", "--port", "65536"), '"65536" is not a port; ports are 0–65535'),
        (("explain", "alpha", "192.0.2.1:65536"), '"192.0.2.1:65536" has port 65536; ports are 0–65535'),
        (("status", "--health-port", "http"), '"http" is not a port; ports are 0–65535'),
        (("maps", "--limit", "0"), "0 is not in the range x>=1"),
        (("accelerate", "fast"), "'fast' is not one of 'off', 'proxy', 'full'"),
        (("completion", "tcsh"), "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (("pods", "--pods", "/never"), "'/never' does not exist"),
    ],
)
def test_a_value_that_makes_no_sense(argv: tuple[str, ...], said: str) -> None:
    assert said in line(sidestep(*argv), 2)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(NEEDS_NOBODY)))
def test_who_is_not_root(command: str) -> None:
    said = line(sidestep_by_user(command, *ARGUMENTS.get(command, ())))
    assert said == "running as uid 1000; run as root with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"


@pytest.mark.parametrize("command", (*READS_PINS, "attach", "detach"))
@pytest.mark.parametrize("there", [True, False], ids=["no-bpffs", "not-there"])
def test_no_bpffs(command: str, there: bool, tmp_path: Path) -> None:
    place = tmp_path if there else tmp_path / "never"
    said = line(sidestep(command, "--bpffs", place, *ARGUMENTS.get(command, ())))
    how = f"mount -t bpf bpf {place}"
    wanted = f"; mount one: {how}" if there else f", it does not exist; make one: mkdir -p {place} && {how}"
    assert said == f"{place} is no bpffs{wanted}"


@pytest.mark.parametrize("command", READS_PINS)
def test_nothing_attached(command: str, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    try:
        said = line(sidestep(command, "--bpffs", tmp_path, *ARGUMENTS.get(command, ())))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    how = "run `sidestep attach` (or start the agent), or give the --bpffs that was attached with"
    assert said == f"nothing is attached: {tmp_path}/sidestep/v1 is not there; {how}"


@pytest.mark.parametrize(
    "argv",
    [
        ("pods", "nobody"),
        ("explain", "nobody", "192.0.2.1:80"),
        ("explain", "nobody", "--inbound", "192.0.2.1"),
        ("maps", "--pod", "nobody"),
        ("maps", "pods", "--pod", "nobody"),
        ("deny", "nobody"),
        ("deny", "nobody", "--kill"),
        ("trace", "nobody"),
    ],
    ids=" ".join,
)
def test_an_unknown_pod(node: Node, argv: tuple[str, ...]) -> None:
    said = line(sidestep(argv[0], "--bpffs", node.bpffs, *argv[1:]))
    assert said == "no enrolled pod is called nobody; enrolled are: default/alpha"


def without(node: Node, *argv: str) -> "subprocess.CompletedProcess[str]":
    """As root in a container that was given no capabilities."""
    dropped = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [sys.executable, "-m", "installer", argv[0], "--bpffs", str(node.bpffs), *argv[1:]]
    return subprocess.run([*dropped, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "argv",
    [
        ("attach",),
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


@pytest.mark.parametrize("command", ["deny", "explain", "maps", "pods", "report", "status"])
def test_looking_takes_none(node: Node, command: str) -> None:
    done = without(node, command, *ARGUMENTS.get(command, ()))
    assert (done.returncode, done.stderr) == (0, "")
