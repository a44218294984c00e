"""`sidestep status`: what an operator sees of a node, whatever state it is in."""

import http.server
import json
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpf.hooks import HOOKS
from bpf.pins import LAYOUT, Pins
from installer import VERSION
from tests.lab.invocation import one_line, sidestep
from tests.lab.machine import statistics_for_one
from tests.lab.node import Node
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh
from tests.node.test_observation import port

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


def options(node: Node, health_port: int | None = None) -> tuple[object, ...]:
    """Where this lab has what a node has at the default places."""
    health = health_port or (port(node, "health") if node.agent.process else 9)
    where = "--bpffs", node.bpffs, "--cni-agent-run-dir", node.run_dir, "--pods", node.pods_dir
    return *where, "--health-port", health


def status(node: Node, *more: object, code: int = 0) -> Any:
    """As a document."""
    done = sidestep("status", *options(node), *more, "--output", "json")
    assert (done.returncode, done.stderr) == (code, "")
    return json.loads(done.stdout)


def table(node: Node, *more: object, code: int = 0) -> str:
    """As text."""
    done = sidestep("status", *options(node), *more)
    assert (done.returncode, done.stderr) == (code, "")
    return done.stdout


def test_a_node_that_works_is_ok_and_described(mesh: Mesh) -> None:
    found = status(mesh.node)
    assert (found["verdict"]["state"], found["verdict"]["findings"]) == ("ok", [])
    assert table(mesh.node).splitlines()[0] == "OK: 2 pods are captured, nothing is wrong"
    assert (found["version"], found["kernel"]) == (VERSION, platform.release())
    assert (found["attached"], found["current"]) == (True, True)
    assert found["attach_point"] == str(mesh.node.kubepods)
    agent = found["agent"]
    assert (agent["pid"], agent["version"], agent["fault"]) == (mesh.node.agent.pid, VERSION, "")
    assert (agent["health"]["ready"], agent["health"]["missing"]) == (True, {})
    assert [each["pod"] for each in found["pods"]] == ["default/alpha", "default/beta"]
    assert found["acceleration"] == {"level": "off", "wanted": "off", "reason": ""}


def test_programs_are_told_with_where_they_run(mesh: Mesh) -> None:
    programs = {each["hook"]: each for each in status(mesh.node)["programs"]}
    assert set(programs) >= {hook.name for hook in HOOKS}
    assert len({each["id"] for each in programs.values()}) == len(programs)
    assert programs["steer"]["attached"] == 2  # once for each pod
    assert {each["attached"] for name, each in programs.items() if name != "steer"} == {1}
    loaded = datetime.fromisoformat(programs["connect4"]["loaded_at"])
    assert timedelta(0) <= datetime.now(UTC) - loaded < timedelta(minutes=5)
    assert all(each["bytes"] > 0 for each in programs.values())


def test_maps_are_told_with_how_full_they_are(mesh: Mesh) -> None:
    maps = {each["name"]: each for each in status(mesh.node)["maps"]}
    counts = mesh.node.entries()
    assert {name: each["entries"] for name, each in maps.items() if name in counts} == {
        name: count for name, count in counts.items() if name != "links"
    }
    assert (maps["pods"]["kind"], maps["pods"]["entries"], maps["pods"]["limit"]) == ("hash", 2, 4096)
    assert maps["pods"]["bytes"] > 2 * 1200
    assert (maps["sockets"]["kind"], maps["sockets"]["entries"]) == ("sk_storage", None)


@pytest.fixture
def statistics() -> Iterator[None]:
    with statistics_for_one():
        yield


def test_runs_are_counted_only_while_the_kernel_does(mesh: Mesh, statistics: None) -> None:
    if STATISTICS.read_text().strip() == "0":
        found = status(mesh.node)
        assert {each["runs"] for each in found["programs"]} == {None}
        assert "sysctl kernel.bpf_stats_enabled=1 makes the kernel count" in table(mesh.node, "--verbose")
        assert STATISTICS.read_text().strip() == "0"
    with counting():
        before = {each["hook"]: each for each in status(mesh.node)["programs"]}["connect4"]
        for _ in range(3):
            assert mesh.alpha.curl(mesh.beta.ip4).pod == "beta"
        after = {each["hook"]: each for each in status(mesh.node)["programs"]}["connect4"]
        assert after["runs"] >= before["runs"] + 3
        assert after["run_seconds"] > before["run_seconds"]
        assert "not counted" not in table(mesh.node, "--verbose")


def test_it_is_the_same_in_yaml_and_fits_a_narrow_terminal(mesh: Mesh) -> None:
    done = sidestep("status", *options(mesh.node), "--output", "yaml")
    assert yaml.safe_load(done.stdout)["programs"] == status(mesh.node)["programs"]
    assert " PROGRAM " not in table(mesh.node)
    narrow = sidestep("status", *options(mesh.node), "--verbose", columns=80).stdout
    rows = narrow[narrow.index(" PROGRAM ") :].splitlines()
    assert max(map(len, rows)) <= 80
    assert f"programs: attached at {mesh.node.kubepods}" in narrow.splitlines()
    assert f"agent: process {mesh.node.agent.pid} (version {VERSION}) answers at" in narrow
    assert "readiness: ready" in narrow.splitlines()


def test_without_its_agent_a_node_is_described_all_the_same(mesh: Mesh) -> None:
    mesh.node.agent.kill()
    try:
        found, text = status(mesh.node, code=1), table(mesh.node, code=1)
    finally:
        mesh.node.agent.start()
    assert text.splitlines()[:2] == ["WRONG: one thing", f"✗ agent: {mesh.node.run_dir}/cni.sock: nobody is there"]
    assert text.splitlines()[2].startswith("  → start this node's agent")
    assert (found["attached"], found["agent"]["pid"], found["agent"]["fault"]) == (True, None, "nobody is there")
    assert found["agent"]["health"]["fault"] == "Connection refused"
    assert next(each["attached"] for each in found["programs"] if each["hook"] == "steer") == 2
    assert f"agent: {mesh.node.run_dir}/cni.sock: nobody is there" in text.splitlines()
    assert "readiness: port 9: Connection refused" in text.splitlines()


def test_an_agent_that_does_not_answer_is_named(mesh: Mesh) -> None:
    os.kill(mesh.node.agent.pid, signal.SIGSTOP)
    try:
        text = table(mesh.node, code=1)
    finally:
        os.kill(mesh.node.agent.pid, signal.SIGCONT)
    process = f"process {mesh.node.agent.pid}"
    assert text.splitlines()[0] == "WRONG: one thing"
    assert f"agent: {mesh.node.run_dir}/cni.sock: no answer within 3 s; {process} listens" in text.splitlines()
    assert f"readiness: port {port(mesh.node, 'health')}: no answer within 3 s" in text.splitlines()


def test_somebody_else_on_the_health_port_is_no_agent(mesh: Mesh) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        done = sidestep("status", *options(mesh.node, other.server_port), "--output", "json")
        other.shutdown()
        thread.join()
    health = json.loads(done.stdout)["agent"]["health"]
    assert not health["ready"]
    assert health["fault"].startswith("no agent answers")
    assert (done.returncode, json.loads(done.stdout)["verdict"]["state"]) == (3, "unknown")


def test_links_that_are_gone_are_seen(node: Node) -> None:
    node.agent.terminate()
    (Pins(node.bpffs).links / "connect4").unlink()
    found = status(node, code=1)
    assert not found["attached"]
    assert {each["hook"]: each["attached"] for each in found["programs"]}["connect4"] == 0
    text = table(node, code=1).splitlines()
    assert text[:3] == [
        "WRONG: 2 things",
        "✗ programs: connect4 not attached",
        f"✗ agent: {node.run_dir}/cni.sock: nobody is there",
    ]
    assert f"programs: NOT attached at {node.kubepods}" in text


def test_programs_that_are_gone_are_seen(node: Node) -> None:
    node.agent.terminate()
    (Pins(node.bpffs).programs / "connect4").unlink()
    found = status(node, code=1)
    assert not found["attached"]
    assert {each["hook"]: each["id"] for each in found["programs"]}["connect4"] is None


def test_the_plugin_and_its_place_in_the_chain_are_told(node: Node, tmp_path: Path) -> None:
    for directory in ("bin", "net.d"):
        (tmp_path / directory).mkdir()
    conf, binary = tmp_path / "net.d" / "10-a.conflist", tmp_path / "bin" / "sidestep-cni"
    where: list[str | Path] = [
        "--shim",
        node.shim,
        "--mounted-cni-bin-dir",
        binary.parent,
        "--mounted-cni-net-dir",
        conf.parent,
    ]
    node.agent.terminate()
    node.agent.options += ["--install", *where]
    node.agent.start()
    wait_until(binary.exists, "the plugin")
    where.append("--install")
    unready = status(node, *where, code=1)
    assert unready["chain"]["plugin"] == {"file": str(binary), "fault": ""}
    assert "no valid CNI configuration yet" in unready["chain"]["entry"]["fault"]
    assert "no valid CNI configuration yet" in unready["agent"]["health"]["missing"]["installed"]
    told = table(node, *where, code=1)
    assert told.splitlines()[0] == "WRONG: one thing"
    assert "readiness: NOT ready: installed: " in told

    conf.write_text(json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}))
    waited = sidestep("status", *options(node), *where, "--wait", "30")
    assert (waited.returncode, waited.stdout.splitlines()[0]) == (0, "OK: no pods are captured, nothing is wrong")
    entry = status(node, *where)["chain"]["entry"]
    assert entry == {"file": str(conf), "fault": "", "found_in": [str(conf)], "rival": "", "remarks": []}
    assert f"chain: {conf}: entry in place" in table(node, *where).splitlines()

    node.agent.terminate()
    binary.write_bytes(b"another")
    (conf.parent / "05-broken.conflist").write_text("{")
    document = json.loads(conf.read_text())
    conf.write_text(json.dumps({**document, "plugins": [*document["plugins"], {"type": "later"}]}))
    changed = status(node, *where, code=1)["chain"]
    assert changed["plugin"]["fault"] == "of another version"
    assert changed["entry"]["fault"] == "entry not last"
    assert "05-broken.conflist is not JSON" in changed["entry"]["remarks"][0]
    binary.unlink()
    conf.write_text(json.dumps({**document, "plugins": document["plugins"][:1]}))
    text = table(node, *where, code=1).splitlines()
    assert f"plugin: {binary}: missing" in text
    assert f"chain: {conf}: entry missing" in text
    without = [line for line in where if line != "--install"]
    assert "plugin and chain: not installed by this agent" in table(node, *without, code=1).splitlines()


def test_where_nothing_is_attached_the_rest_is_told_all_the_same(node: Node) -> None:
    node.agent.terminate()
    detached = sidestep("detach", "--bpffs", node.bpffs)
    assert detached.returncode == 0, detached.stderr
    asked = ("status", *options(node, 9), "--cgroup", node.kubepods, "--output")
    done = {output: sidestep(*asked, output) for output in ("table", "json", "yaml")}
    assert {(each.returncode, each.stderr) for each in done.values()} == {(1, "")}
    missing = f"nothing is attached: --bpffs {node.bpffs} has no {Pins(node.bpffs).root}; "
    lines = done["table"].stdout.splitlines()
    at = lines.index(f"sidestep {VERSION}, kernel {platform.release()}")
    assert [line[0] for line in lines[: at - 1]] == ["W", "✗", "✗", " "]  # two things, and one remedy
    assert lines[at + 1].startswith(f"programs: NOT attached: {missing}")
    assert lines[at + 2] == f"attach point: {node.kubepods}"
    assert f"agent: {node.run_dir}/cni.sock: nobody is there" in lines
    assert "plugin and chain: not installed by this agent" in lines
    found = json.loads(done["json"].stdout)
    assert yaml.safe_load(done["yaml"].stdout) == found
    assert (found["attached"], found["attach_point"]) == (False, str(node.kubepods))
    assert found["problem"].startswith(missing)
    assert (found["version"], found["kernel"]) == (VERSION, platform.release())
    assert (found["agent"]["fault"], found["chain"]["plugin"]["file"]) == (
        "nobody is there",
        "/host/opt/cni/bin/sidestep-cni",
    )


def test_without_bpffs_the_rest_is_told_too() -> None:
    done = sidestep("status", "--bpffs", "/never", "--output", "json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["attached"]) == (1, False)
    assert found["problem"].startswith("--bpffs /never does not exist; ")


def test_pins_of_another_layout_are_named_and_not_to_be_detached(node: Node) -> None:
    node.agent.terminate()
    pins = Pins(node.bpffs)
    pins.root.rename(pins.top / "v0")
    try:
        found = status(node, code=1)
        said = next(line for line in table(node, code=1).splitlines() if line.startswith("programs: "))
        refused = one_line(sidestep("maps", "--bpffs", node.bpffs))
    finally:
        (pins.top / "v0").rename(pins.root)
    assert found["attached"] is None
    assert said == f"programs: {found['problem']}"
    assert refused == f"sidestep: {found['problem']}"
    assert (
        f"has the pins of layout v0, not {LAYOUT}; another version of sidestep is attached: use that version's command"
        in said
    )
    assert "detach" not in said


@contextmanager
def counting() -> Iterator[None]:
    """As the operator would turn it on, and off again."""
    before = STATISTICS.read_text()
    STATISTICS.write_text("1")
    try:
        yield
    finally:
        STATISTICS.write_text(before)


def test_a_proxy_that_has_ended_with_its_deleted_pod_is_no_fault(node: Node) -> None:
    pod = node.pod("alpha", app=False)
    pod.envoy.stop()
    wait_until(lambda: status_is(node, "wrong"), "the proxy to be gone")
    manifest = pod.manifest()
    manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    (node.pods_dir / "alpha.yaml").write_text(yaml.safe_dump(manifest))
    assert status(node)["sidecars"]["ending"] == ["default/alpha"]


def status_is(node: Node, state: str) -> bool:
    done = sidestep("status", *options(node), "--output", "json")
    return bool(json.loads(done.stdout)["verdict"]["state"] == state)
