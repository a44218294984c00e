"""Every command line of README.md and docs/*.md is typed on a lab's node, with the lab's names put in.

A line that names a command without what it needs (`sidestep explain`) is a mention: its command and options must exist.
"""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import click
import pytest

from installer.commands.cli import cli
from installer.kubectl.cli import cli as plugin
from tests.lab import invocation
from tests.lab.invocation import REPOSITORY
from tests.lab.node import Node

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
_GENERATED = "<!-- Everything below is what `--help` shows."
_IN_BLOCK = re.compile(r" {4,}(?:\$ )?((?:\./|kubectl )?sidestep [^#]*?)(?:\s+#.*)?")
_IN_TEXT = re.compile(r"`((?:\./|kubectl )?sidestep [^`]*)`")
_OUTPUT = re.compile(r"sidestep \d")  # a version, in what a command has printed
# what is not a pod's or a node's name: what the pages put in its place → what this lab has there
_PLACEHOLDERS = (
    (r"NAMESPACE/NAME NAMESPACE/NAME:PORT", "default/alpha default/beta:8080"),
    (r"NAMESPACE/NAME", "default/alpha"),
    (r"POD POD:PORT", "alpha beta:8080"),
    (r"POD ADDRESS:PORT", "alpha {beta}:8080"),
    (r"ADDRESS:PORT", "{beta}:8080"),
    (r"explain …", "explain alpha {beta}:8080"),
    (r"--dest …", "--dest :80"),
    (r"--pod …", "--pod alpha"),
    (r"maps NAME", "maps pods"),
    (r"COMMAND --help", "status --help"),
    (r"\bFROM\b", "{beta}"),
    (r"\bPORT\b", "8080"),
    (r"\b[UG]ID\b", "1000"),
    (r"\bPOD\b", "alpha"),
    (r"\bproductpage\b", "alpha"),
    (r"\breviews\b", "beta"),
    (r"\b10\.29\.24\.2\b", "{alpha}"),
    (r" > FILE", ""),
    (r" \| (source|head)", ""),
)
# these end what the other commands look at, so they come last, each where the page says that it may be typed
_LAST = ("detach", "uninstall", "uninstall --keep-capture", "uninstall --end-capture")


def lines() -> list[str]:
    """Every command line, each once."""
    found = {}
    for page in PAGES:
        for line in page.read_text().partition(_GENERATED)[0].splitlines():
            block = _IN_BLOCK.fullmatch(line)
            for each in [block[1]] if block else _IN_TEXT.findall(line):
                if not _OUTPUT.match(each):
                    found[each.strip().removeprefix("./")] = page.name
    return list(found)


def split(line: str) -> list[str]:
    """The commands of a line: `sidestep attach | detach` are two."""
    first, bar, second = line.partition(" | ")
    return [first, f"sidestep {second}"] if bar and second in cli.list_commands(None) else [line]  # type: ignore[arg-type]


OF_AGENT = [each for line in lines() if line.startswith("sidestep ") for each in split(line)]
OF_KUBECTL = [line for line in lines() if line.startswith("kubectl ")]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod("alpha")
        made.pod("beta", annotations={"sidestep.io/deny-inbound-ports": "23"})
        yield made


def typed(node: Node, argv: list[str]) -> Any:
    """As after the `export` line of `make demo KEEP=1`."""
    export = {
        "SIDESTEP_BPFFS": node.bpffs,
        "SIDESTEP_CGROUP": node.kubepods,
        "SIDESTEP_PODS": node.pods_dir,
        "CNI_AGENT_RUN_DIR": node.run_dir,
        "SIDESTEP_HEALTH_PORT": node.agent.port("health") if node.agent.process else 9,
    }
    return invocation.sidestep(*argv, environment={name: str(value) for name, value in export.items()}, seconds=120)


def filled(node: Node, line: str) -> list[str]:
    """The line's words with the lab's names."""
    for placeholder, value in _PLACEHOLDERS:
        line = re.sub(placeholder, value, line)
    names = {name: str(pod.ip4) for name, pod in node.pods.items()}
    return shlex.split(line.format(**names))[1:]


def command_of(group: click.Command, argv: list[str]) -> click.Command:
    assert isinstance(group, click.Group)
    found = group.get_command(click.Context(group), argv[0])
    assert found is not None, f"there is no command {argv[0]}"
    return found


def is_mention(command: click.Command, argv: list[str]) -> bool:
    """Whether the words leave out an argument or an option's value that the command needs."""
    try:
        command.make_context(argv[0], argv[1:])
    except (click.MissingParameter, click.BadOptionUsage):
        return True
    except (click.UsageError, click.exceptions.Exit):
        return False
    needs_more = {"explain": 2, "accelerate": 1}
    return len([word for word in argv[1:] if not word.startswith("-")]) < needs_more.get(argv[0], 0)


def options_of(command: click.Command) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"-h", "--help"}


def test_there_are_many_and_each_page_is_read() -> None:
    assert len(OF_AGENT) > 50
    assert len(OF_KUBECTL) > 5
    assert set(_LAST) <= {each.removeprefix("sidestep ") for each in OF_AGENT}


@pytest.mark.parametrize("line", [each for each in OF_AGENT if each.removeprefix("sidestep ") not in _LAST])
def test_a_command_line_of_the_pages_works(node: Node, line: str) -> None:
    argv = filled(node, line)
    if argv == ["…"]:  # any command
        return
    command = command_of(cli, argv)
    if is_mention(command, argv) or argv[:2] == ["agent", "--pods"]:
        assert {word for word in argv if word.startswith("-")} <= options_of(command)
        return
    if argv[0] == "trace" and "--seconds" not in argv:
        argv += ["--seconds", "0.2"]
    if argv[0] == "report":
        argv += ["--seconds", "0.1"]
    if argv[0] == "bugreport":
        argv = ["bugreport", "--help"]  # tests/node/test_bugreport.py makes one
    done = typed(node, argv)
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    if argv[0] == "top":
        assert done.stderr.startswith("sidestep: top needs a terminal")
    elif argv[:2] in (["pods", "odd"], ["pods", "wrong"]):  # which `make faults` makes
        assert done.stderr.startswith("sidestep: no enrolled pod is called ")
    else:
        # a finding is no failure: 1 says that something is wrong, 3 that it can't be told
        assert done.returncode in (0, 1, 3), done.stderr
        assert done.stdout or (argv[0] == "trace" and done.stderr.startswith("tracing\n")), done.stderr


@pytest.mark.parametrize("line", OF_KUBECTL)
def test_a_command_of_the_plugin_exists_with_its_options(line: str) -> None:
    argv = shlex.split(line.partition(" > ")[0].replace("…", "80"))[2:]
    command = command_of(plugin, argv)
    if argv[0] == "on" or command.context_settings.get("ignore_unknown_options"):
        return  # what follows is the agent's own
    assert {word for word in argv if word.startswith("-")} <= options_of(command)


def test_what_ends_capture_works_as_the_pages_say(node: Node) -> None:
    node.agent.terminate()
    for argv in (["detach"], ["uninstall"]):
        refused = typed(node, argv)
        assert refused.returncode == 1
        assert "running mesh pods of this node would lose capture" in refused.stderr.replace("\n", " ")
    binaries, net = node.directory / "bin", node.directory / "net.d"
    for each in (binaries, net):
        each.mkdir()
    where = ["--mounted-cni-bin-dir", binaries, "--mounted-cni-net-dir", net]
    for option in ("--keep-capture", "--end-capture"):
        done = typed(node, ["uninstall", option, *map(str, where), "--output", "json"])
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout)["done"], list)
    assert "nothing is attached" in typed(node, ["status"]).stdout
