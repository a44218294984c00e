"""Every command line of README.md and docs/, run on a node of two mesh pods.

Those of `kubectl sidestep` run in a real cluster (tests/cluster/scenarios/plugin.py); here their words are understood.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from installer.commands.kubectl_plugin import plugin
from tests.lab.invocation import sidestep
from tests.lab.node import Node
from tests.node.conftest import Mesh
from tests.node.documented import Documented, documented, with_names
from tests.node.test_observation import port

COMMANDS = documented()
# commands that go on until Ctrl-C
ENDLESS = ("trace", "top")
_UNTIL_CTRL_C = ("timeout", "--foreground", "--preserve-status", "--signal=INT")
_AT_WORK = ("3", "20")  # seconds until the Ctrl-C; the latter if the former came before the command was at work
_NOT_YET = 130  # then the interpreter ends by itself, as shells say it: 128 and SIGINT
# commands whose output is no text
BINARY = ("bugreport", "kubectl-plugin")
_TO_A_FILE = ("sh", "-c", 'exec "$@" > /dev/null', "sh")
# commands that end with 1, and say nothing on standard error, if what they have found is not well
FINDING = ("explain", "migrate")
# commands that change the node: they run on one of their own, in this order, the latter without its agent
CHANGING = ("takeover", "giveback", "accelerate", "deny", "attach", "detach", "uninstall")
_WITHOUT_AGENT = CHANGING[4:]
# what the pages mention without all that it needs
INCOMPLETE = ("Missing argument", "requires an argument", "give either the names of pods or --all")
# command lines that fail on this node, and with what words
FAILING = {
    "sidestep giveback shop/web-0": "was not taken over",
    "sidestep agent --pods DIR": "another agent serves",
    "sidestep pods odd": "odd",
    "sidestep pods wrong": "wrong",
    "sidestep top": "terminal",
    "sidestep uninstall": "--end-capture",
    "sidestep detach": "--end-capture",
}


def environment(node: Node) -> dict[str, str]:
    """A node's settings, as its agent's container has them."""
    return {
        "SIDESTEP_BPFFS": str(node.bpffs),
        "SIDESTEP_CGROUP": str(node.kubepods),
        "CNI_AGENT_RUN_DIR": str(node.run_dir),
        "SIDESTEP_PODS": str(node.pods_dir),
        "MOUNTED_CNI_NET_DIR": str(node.run_dir),
        "SIDESTEP_HEALTH_PORT": str(port(node, "health")),
        "MONITORING_PORT": str(port(node, "metrics")),
    }


def names(mesh: Mesh) -> dict[str, str]:
    """The lab's for those of the pages."""
    alpha, beta = "alpha", "beta"
    return {
        "NAMESPACE/NAME": "default/alpha",
        "ADDRESS:PORT": f"{mesh.beta.ip4}:8080",
        "POD": alpha,
        "PORT": "8080",
        "FROM": str(mesh.gamma.ip4),
        "UID": "1000",
        "GID": "1000",
        "DIR": str(mesh.node.pods_dir),
        "NAME": "pods",
        "web-0": alpha,
        "db-0": beta,
        "shop": "default",
        "productpage": alpha,
        "reviews": beta,
    }


@pytest.fixture(scope="module")
def changing() -> Iterator[Mesh]:
    with Node() as node:
        yield Mesh(node, node.pod("alpha"), node.pod("beta"), node.pod("gamma", mesh=False))


def run(command: Documented, mesh: Mesh) -> "subprocess.CompletedProcess[str]":
    words = with_names(command.words, names(mesh))
    through = _TO_A_FILE if words[0] in BINARY else ()
    if words[0] in ENDLESS:
        return run_until_ctrl_c(words, mesh)
    done = sidestep(*words, environment=environment(mesh.node), through=through, seconds=180)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_until_ctrl_c(words: list[str], mesh: Mesh) -> "subprocess.CompletedProcess[str]":
    for seconds in _AT_WORK:
        done = sidestep(*words, environment=environment(mesh.node), through=(*_UNTIL_CTRL_C, seconds))
        if done.returncode != _NOT_YET:
            break
    assert "Traceback" not in done.stderr, done.stderr
    return done


def of_node(is_changing: bool) -> list[Documented]:
    own = [each for each in COMMANDS if each.program == "sidestep"]
    return [each for each in own if (each.words[0] in CHANGING) is is_changing]


def is_right(command: Documented, done: "subprocess.CompletedProcess[str]") -> bool:
    if done.returncode == 2:
        return any(words in done.stderr for words in INCOMPLETE)
    if words := FAILING.get(str(command)):
        *logged, last = done.stderr.splitlines()
        return done.returncode == 1 and words in last and (not logged or command.words[0] == "agent")
    if command.words[0] == "shadow":  # no pod here has Istio's rules
        return done.returncode == 3 and "shadow pod" in done.stdout + done.stderr
    if command.words[0] in FINDING and done.returncode == 1:
        return bool(done.stdout) and not done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("command", of_node(False), ids=str)
def test_what_looks_at_a_node(mesh: Mesh, command: Documented) -> None:
    done = run(command, mesh)
    assert is_right(command, done), done


def test_what_changes_a_node(changing: Mesh) -> None:
    commands = sorted(of_node(True), key=lambda each: (CHANGING.index(each.words[0]), str(each)))
    for number, each in enumerate(commands):
        if each.words[0] in _WITHOUT_AGENT and commands[number - 1].words[0] not in _WITHOUT_AGENT:
            changing.node.agent.terminate()
        done = run(each, changing)
        assert is_right(each, done), done


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.program != "sidestep"], ids=str)
def test_the_plugin_understands_what_is_asked_of_it(mesh: Mesh, command: Documented) -> None:
    """Without a cluster it says in one line that there is none."""
    words = with_names(command.words, {**names(mesh), "NODE": "node-1", "COMMAND": "maps"})
    with NamedTemporaryFile(suffix=".pyz") as file:
        Path(file.name).write_bytes(plugin())
        nowhere = {"PATH": "/usr/bin:/bin", "KUBECONFIG": "/nowhere"}
        argv = ["/usr/bin/python3", "-I", file.name, *words]
        done = subprocess.run(argv, env=nowhere, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
