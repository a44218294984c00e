"""What somebody who knows kubectl expects of every command: options, columns, widths, completion."""

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from installer import VERSION
from tests.lab import invocation
from tests.lab.node import Node
from tests.lab.terminal import screen_of
from tests.node.sidestep import document, sidestep
from tests.node.test_status import options
from tests.node.test_walk import LISTEN, running

REAL = "deployment-6b746f74dc-9rlmh"
DENIES = {"sidestep.io/deny-outbound-ports": "25", "sidestep.io/deny-inbound-ports": "23"}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod(REAL, namespace="namespace", annotations=DENIES)
        made.pod("web", annotations=DENIES)
        made.pod("bare", envoy=False, app=False)
        yield made


@pytest.mark.parametrize(
    "argv",
    [
        ("status",),
        ("status", "--verbose"),
        ("pods",),
        ("pods", "--refused"),
        ("deny",),
        ("maps",),
        ("maps", "port_rules"),
        ("explain", f"namespace/{REAL}", "web:8080"),
        ("explain", "web", f"namespace/{REAL}:9999"),
        ("explain", f"namespace/{REAL}", "192.0.2.1:80"),
        ("version",),
        ("--help",),
        ("help", "pods"),
    ],
    ids=" ".join,
)
def test_a_terminal_of_80_columns_has_room_for_real_names(node: Node, argv: tuple[str, ...]) -> None:
    known = options(node) if argv[0] == "status" else options(node)[:6] if argv[0] in ("pods", "explain") else ()
    known = options(node)[:2] if argv[0] in ("deny", "maps") else known
    lines = screen_of(*argv, *known)
    assert lines
    assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []  # a path alone may be longer
    if argv[0] in ("pods", "deny") and "--refused" not in argv:
        assert any(re.match(rf" namespace +{REAL} ", line) for line in lines), lines  # not folded


def test_names_are_two_columns_and_the_titles_are_in_capitals(node: Node) -> None:
    for argv in (("pods",), ("deny",)):
        lines = sidestep(node, *argv).stdout.splitlines()
        titles = next(line for line in lines if line.strip())
        assert titles.split()[:2] == ["NAMESPACE", "NAME"]


def test_one_namespace_is_chosen_by_n_and_all_by_a(node: Node) -> None:
    for command in ("pods", "deny"):
        for argv, names in (
            (("-n", "namespace"), {REAL}),
            (("-n", "nowhere"), set()),
            (("-A",), {REAL, "web"}),
            ((), {REAL, "web"}),
        ):
            found = document(node, command, *argv)
            assert {each["name"] for each in found} - {"bare"} == names
    assert document(node, "pods", REAL, "-n", "namespace")["pod"] == f"namespace/{REAL}"
    assert document(node, "pods", f"namespace/{REAL}", "-n", "default")["namespace"] == "namespace"
    refused = sidestep(node, "pods", REAL, "-n", "default")
    assert "no enrolled pod is called default/deployment-6b746f74dc-9rlmh" in refused.stderr
    walked = document(node, "explain", "web", "bare:80", "-n", "default", status=1)
    assert (walked["client"], walked["server"]) == ("default/web", "default/bare")
    assert document(node, "maps", "pods", "--pod", "web", "-n", "default")["entries"][0]["value"]["name"] == "web"
    both = sidestep(node, "pods", "-A", "-n", "default")
    assert (both.returncode, both.stderr) == (2, "sidestep: give either -n or -A; see sidestep pods --help\n")


def test_without_titles_there_are_rows_and_nothing_else(node: Node) -> None:
    rows = [line.split() for line in sidestep(node, "pods", "--no-headers").stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["default", "bare", "proxy"],
        ["default", "web", "captured"],
        ["namespace", REAL, "captured"],
    ]
    assert len(sidestep(node, "deny", "--no-headers").stdout.splitlines()) == 2
    names = [line.split()[0] for line in sidestep(node, "maps", "--no-headers").stdout.splitlines()]
    assert "pods" in names and "MAP" not in names
    assert sidestep(node, "pods", "--no-headers", "-n", "nowhere").stdout == ""


def test_o_is_output_everywhere(node: Node) -> None:
    for argv in (("pods",), ("deny",), ("maps",), ("maps", "pods"), ("explain", "web", "192.0.2.1:80")):
        told = json.loads(sidestep(node, *argv, "-o", "json").stdout)
        assert yaml.safe_load(sidestep(node, *argv, "-o", "yaml").stdout) == told
        assert sidestep(node, *argv, "-o", "wide").stdout.splitlines() != []
    lines = sidestep(node, "maps", "pods", "-o", "jsonl").stdout.splitlines()
    assert sorted(json.loads(line)["value"]["name"] for line in lines) == sorted(["bare", "web", REAL])
    report = sidestep(node, "report", "--seconds", "0.1", "-o", "json")
    assert json.loads(report.stdout)["attached"]


def test_version_and_help_are_commands_that_need_no_root(node: Node) -> None:
    assert invocation.sidestep_by_user("version").stdout.startswith(f"sidestep {VERSION}, kernel ")
    assert json.loads(invocation.sidestep_by_user("version", "-o", "json").stdout)["version"] == VERSION
    listed = invocation.sidestep_by_user("help").stdout
    assert listed == invocation.sidestep_by_user("--help").stdout
    assert "See what is going on:" in listed
    assert invocation.sidestep_by_user("help", "pods").stdout == invocation.sidestep_by_user("pods", "--help").stdout
    wrong = invocation.sidestep_by_user("help", "podz")
    assert (wrong.returncode, "Did you mean" in wrong.stderr or "No such command" in wrong.stderr) == (2, True)


def test_help_has_the_agents_settings_apart_and_examples(node: Node) -> None:
    told = invocation.sidestep_by_user("pods", "--help").stdout
    own, _, settings = told.partition("The agent's settings, which its container has in the environment:")
    assert "--no-headers" in own and "--bpffs" not in own
    assert "--bpffs" in settings and "--refused" not in settings
    assert "sidestep pods shop/web-0 " in own


def test_the_same_state_has_the_same_word_in_every_command(node: Node) -> None:
    states = {each["pod"]: each["state"] for each in document(node, "pods")}
    assert states["default/bare"] == "proxy absent"
    found = json.loads(sidestep(node, "status", *options(node)[2:], "-o", "json").stdout)
    assert {each["pod"]: each["state"] for each in found["pods"]} == states
    assert "  state         proxy absent\n" in sidestep(node, "pods", "bare").stdout
    report = json.loads(sidestep(node, "report", "--seconds", "0.1", "-o", "json").stdout)
    assert {each["pod"]: each["state"] for each in report["pods"]} == states
    with running(node.pods["bare"], LISTEN, "0.0.0.0", 15006):
        assert document(node, "pods", "bare")["state"] == "proxy other user"
        report = json.loads(sidestep(node, "report", "--seconds", "0.1", "-o", "json").stdout)
        assert {each["pod"]: each["state"] for each in report["pods"]}["default/bare"] == "proxy other user"


def completed(node: Node, words: str) -> list[str]:
    """What a shell offers for the last word."""
    asked = {"_SIDESTEP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = invocation.sidestep(environment=asked | {"SIDESTEP_BPFFS": str(node.bpffs)})
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_names_of_pods_complete(node: Node) -> None:
    assert completed(node, "sidestep pods ") == ["bare", "web", REAL]
    assert completed(node, "sidestep explain w") == ["web"]
    assert completed(node, "sidestep explain web dep") == [REAL]
    assert completed(node, "sidestep trace namespace/") == [f"namespace/{REAL}"]
    assert completed(node, "sidestep deny -n namespace ") == [REAL]
    assert completed(node, "sidestep maps pods --pod de") == [REAL]
    asked = {"_SIDESTEP_COMPLETE": "bash_complete", "COMP_WORDS": "sidestep pods ", "COMP_CWORD": "2"}
    nobody = invocation.sidestep_by_user(environment=asked | {"SIDESTEP_BPFFS": str(node.bpffs)})
    assert (nobody.returncode, nobody.stderr) == (0, "")  # whether this user may read them or not
