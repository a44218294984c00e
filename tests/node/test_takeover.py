"""Another version whose maps have other shapes takes over under load, and going back works the same way."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf.pins import LAYOUT
from tests.lab.apiserver import ApiServer
from tests.lab.command import tracing
from tests.lab.invocation import sidestep
from tests.lab.node import REPOSITORY, Node
from tests.lab.pod import APP_TCP_PORT, Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh
from tests.node.test_resilience import under_load
from tests.node.test_top import shown
from tests.node.test_trace import events_of

# what the other version has otherwise: file, text, and the text in its place
Change = tuple[tuple[str, str, str], ...]
RAISED: Change = (("bpf/maps.h", "#define MAX_ADDRESSES 131072", "#define MAX_ADDRESSES 262144"),)
POD: Change = (
    ("bpf/maps.h", "    struct address source4;", "    __u32 more;\n    struct address source4;"),
    ("bpf/layout.py", '        ("source4", Address),', '        ("more", U32),\n        ("source4", Address),'),
)
SOCKET: Change = (
    (
        "bpf/maps.h",
        "    struct opener opener;\n    __u32 flags;",
        "    struct opener opener;\n    __u64 more;\n    __u32 flags;",
    ),
    ("bpf/layout.py", '"sockets": 48', '"sockets": 56'),
)
LISTENERS: Change = (("bpf/maps.h", "#define MAX_LISTENERS 65536", "#define MAX_LISTENERS 32768"),)
CHANGES = {
    "a constant": RAISED,
    "sockets": SOCKET,
    "listeners": LISTENERS,
    "all": (*POD, *SOCKET, *LISTENERS),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with ApiServer().running() as api, Node(api=api) as node:
        yield Mesh(node, node.pod("alpha"), node.pod("beta"), node.pod("gamma", mesh=False))


def another_version(directory: Path, change: Change) -> Path:
    for package in ("bpf", "cni", "installer"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, after in change:
        text = (directory / name).read_text()
        assert text.count(before) == 1, before
        (directory / name).write_text(text.replace(before, after))
    return directory


@pytest.mark.claim("running pods are captured by one version or the other at each moment")
@pytest.mark.parametrize("change", CHANGES)
def test_another_layout_takes_over_under_load_and_back(mesh: Mesh, tmp_path: Path, change: str) -> None:
    node = mesh.node
    other = another_version(tmp_path, CHANGES[change])
    entries = {name: count for name, count in node.entries().items() if name in ("pods", "addresses", "links")}

    def layouts() -> set[str]:
        return {path.name for path in (node.bpffs / "sidestep").glob("v*") if (path / "maps").exists()}

    def replaced_by(source: Path) -> None:
        node.agent.terminate()
        node.agent.start(source)
        wait_until(lambda: len(layouts()) == 1, "one layout to be left", 20)

    def disturb() -> int:
        replaced_by(other)
        assert layouts() != {LAYOUT}
        replaced_by(REPOSITORY)
        assert layouts() == {LAYOUT}
        return 0

    under_load(mesh, disturb)
    assert "programs=beside" in node.agent.log.read_text()
    after = node.entries()
    assert {name: after[name] for name in entries} == entries
    for ip in mesh.beta.ips:
        assert mesh.alpha.curl(ip).pod == "beta"
    late = node.pod(f"late{list(CHANGES).index(change)}")
    assert late.curl(mesh.alpha.ip4).pod == "alpha"
    late.stop()


def test_pods_that_are_not_found_stay_captured_by_the_other_version_and_are_named(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node
    blind = tmp_path / "proc"  # with the agent's own process alone, and no mounts
    for name in ("1", "self"):
        (blind / name).mkdir(parents=True)
        (blind / name / "ns").symlink_to(f"/proc/{name}/ns")
        (blind / name / "mountinfo").touch()
    (blind / "sys").symlink_to("/proc/sys")

    def restart(*options: str | Path, source: Path) -> None:
        node.agent.terminate()
        before = len(node.agent.options)
        node.agent.options += options
        node.agent.start(source)
        del node.agent.options[before:]

    other = another_version(tmp_path / "other", POD)
    restart(source=other)
    restart("--proc", blind, source=REPOSITORY)
    told = [line for line in node.agent.log.read_text().splitlines() if "event=layout.kept" in line]
    assert {line.partition("pod=")[2].split()[0] for line in told} == {"default/alpha", "default/beta"}
    assert node.api
    events = node.api.events
    wait_until(lambda: "NotTakenOver" in {each["reason"] for each in events}, "the Events")
    found = json.loads(sidestep("status", "--bpffs", node.bpffs, "--output", "json").stdout)
    assert [sorted(pods) for pods in found["kept_by_others"].values()] == [["default/alpha", "default/beta"]]
    assert "pods that are not taken over: default/alpha, default/beta" in " ".join(
        sidestep("status", "--bpffs", node.bpffs).stdout.split()
    )

    def captured(one: Pod, other: Pod) -> None:
        for pod in (one, other):
            pod.envoy.connections()
        assert one.curl(other.ip4).pod == other.name
        assert one.envoy.next_connection().listener == "outbound"
        assert other.envoy.next_connection().listener == "inbound"

    captured(mesh.alpha, mesh.beta)
    later = node.pod("later")  # by this version, while the other has the older pods
    captured(later, mesh.beta)
    captured(mesh.alpha, later)
    restart(source=other)  # back in the middle of it, and forth again
    captured(mesh.alpha, later)
    captured(later, mesh.beta)
    restart(source=REPOSITORY)
    assert json.loads(sidestep("status", "--bpffs", node.bpffs, "--output", "json").stdout)["kept_by_others"] == {}
    captured(mesh.alpha, later)
    captured(later, mesh.beta)


def test_commands_that_run_for_long_end_when_another_version_takes_over(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node
    other = another_version(tmp_path, RAISED)
    with tracing(node, "--output", "json") as trace, shown(mesh, columns=500) as terminal:
        terminal.shows("default/alpha")
        mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT)
        assert events_of(trace, 4)
        node.agent.terminate()
        node.agent.start(other)
        terminal.shows("another version of sidestep is attached", seconds=30)
        assert terminal.ends() == 1
        assert trace.wait(30) == 1
        assert trace.stderr is not None
        said = trace.stderr.read()
    layouts = rf"layout v\w+, not {LAYOUT}; another version of sidestep is attached: use that version's command"
    assert re.fullmatch(
        rf"traced: 4 events, 0 lost\nsidestep: {node.bpffs}/sidestep has the pins of {layouts}.*\n", said
    )
    node.agent.terminate()
    node.agent.start(REPOSITORY)
