"""`sidestep maps`: what an operator reads in the kernel's tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpf.attachment import attach_programs
from bpf.layout import TABLES, Address, ConnectionKey, DestinationEntry, PortKey, PortRule, Word
from bpf.pins import Pins
from bpf.tables import Tables
from tests.datapath.wires import scratch_pins
from tests.lab.invocation import REPOSITORY, one_line, sidestep
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

EXCLUDED = {
    "traffic.sidecar.istio.io/excludeOutboundPorts": "22,3306",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.9.0.0/16,fd01::/64",
}
MANY = 50_000  # as objects of Python they would take some 50 MiB


@pytest.fixture(scope="module")
def choosy(mesh: Mesh) -> Pod:
    """A pod with rules of its own."""
    return mesh.node.pod("choosy", annotations=EXCLUDED)


def listed(node: Node, *argv: object) -> list[Any]:
    """The entries of a map, as JSON has them."""
    done = sidestep("maps", *argv, "--bpffs", node.bpffs, "--output", "json")
    assert (done.returncode, done.stderr) == (0, "")
    entries: list[Any] = json.loads(done.stdout)["entries"]
    return entries


def text(node: Node, *argv: object, columns: int = 120) -> str:
    """The same as a table."""
    done = sidestep("maps", *argv, "--bpffs", node.bpffs, columns=columns)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_maps_are_listed(mesh: Mesh, choosy: Pod) -> None:
    done = sidestep("maps", "--bpffs", mesh.node.bpffs, "--output", "json")
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert set(found) >= set(TABLES)
    assert (found["pods"]["entries"], found["pods"]["limit"]) == (3, 4096)
    assert " pods " in text(mesh.node)
    own = json.loads(sidestep("maps", "--bpffs", mesh.node.bpffs, "--pod", "default/choosy", "--output", "json").stdout)
    assert {each["name"]: each["entries"] for each in own}["networks"] == 2
    assert {each["name"]: each["entries"] for each in own}["pods"] == 1


def test_every_table_can_be_read(mesh: Mesh, choosy: Pod) -> None:
    assert choosy.curl(mesh.beta.ip4).pod == "beta"
    for name in set(TABLES) - {"steered"}:
        for entry in listed(mesh.node, name):
            assert set(entry) == {"key", "value"}
            assert not [field for field in (*entry["key"], *entry["value"]) if field.startswith("zero")]


POLICY = ("ipv6", "outbound_all", "inbound_all", "port_rules", "networks")


def test_a_pod_is_told_in_words(mesh: Mesh, choosy: Pod) -> None:
    (entry,) = listed(mesh.node, "pods", "--pod", "default/choosy")
    assert entry["key"]["pod"] == "default/choosy"
    value = entry["value"]
    assert value["flags"] == [*POLICY, "routes", "loopback_stays"]
    assert (value["source4"], value["source6"]) == (str(choosy.ip4), str(choosy.ip6))
    assert (value["uid"], value["acceleration"], value["proxy_uid"]) == (choosy.uid, "proxy", 1337)
    words = text(mesh.node, "pods", "--pod", "default/choosy").splitlines()
    assert f"source4              {choosy.ip4}" in words
    assert f"flags                {','.join(value['flags'])}" in words


def test_rules_are_told_with_their_pod(mesh: Mesh, choosy: Pod) -> None:
    rules = {
        each["key"]["port"]: each["value"]["rules"]
        for each in listed(mesh.node, "port_rules", "--pod", "default/choosy")
    }
    assert rules[22] == rules[3306] == ["exclude_outbound"]
    networks = {each["key"]["network"]: each["value"] for each in listed(mesh.node, "networks")}
    assert networks == {"10.9.0.0/16": {"verdict": "excluded"}, "fd01::/64": {"verdict": "excluded"}}
    addresses = {each["key"]["address"]: each["key"]["pod"] for each in listed(mesh.node, "addresses")}
    assert addresses[str(choosy.ip4)] == addresses[str(choosy.ip6)] == "default/choosy"
    assert addresses[str(mesh.alpha.ip4)] == "default/alpha"
    row = next(line for line in text(mesh.node, "networks").splitlines() if "10.9" in line)
    assert row.split() == [
        "default/choosy",
        str(listed(mesh.node, "networks")[0]["key"]["cookie"]),
        "10.9.0.0/16",
        "0",  # the number of its policy
        "excluded",
    ]


def test_listeners_and_counters_are_told(mesh: Mesh) -> None:
    wait_until(lambda: bool(listed(mesh.node, "listeners", "--pod", "default/alpha")), "the proxy to listen")
    listeners = listed(mesh.node, "listeners", "--pod", "default/alpha")
    assert {each["key"]["port"] for each in listeners} == {15006}
    assert {each["key"]["pod"] for each in listeners} == {"default/alpha"}

    def captured() -> tuple[int, int]:
        (tally,) = listed(mesh.node, "tallies", "--pod", "default/alpha")
        totals = {each["key"]["connections"]: each["value"]["count"] for each in listed(mesh.node, "totals")}
        return tally["value"]["connections"]["outbound_captured"], totals["outbound_captured"]

    before = captured()
    assert mesh.alpha.curl(mesh.beta.ip4).pod == "beta"
    assert captured() == (before[0] + 1, before[1] + 1)


def test_what_is_in_network_order_is_told_in_host_order(mesh: Mesh) -> None:
    with Tables(Pins(mesh.node.bpffs)) as tables:
        cookie = next(key.cookie for key, _ in tables.pods.every())
        client, server = Address.of(mesh.alpha.ip4), Address.of(mesh.alpha.ip6)
        key = ConnectionKey(cookie, client, server, 40000, 15001)
        tables.handshakes.put(key, DestinationEntry(Address.of(mesh.beta.ip4), 0x5000, 2))  # 80 as it is on the wire
        try:
            (entry,) = listed(mesh.node, "handshakes")
        finally:
            tables.handshakes.remove(key)
    assert entry["value"] == {"address": str(mesh.beta.ip4), "port": 80, "family": "IPv4"}
    ends = {"client": str(mesh.alpha.ip4), "server": str(mesh.alpha.ip6), "client_port": 40000, "server_port": 15001}
    assert entry["key"].items() >= ends.items()
    assert entry["key"]["pod"].startswith("default/")


def test_limits_say_how_many_were_left_out(mesh: Mesh, choosy: Pod) -> None:
    every = listed(mesh.node, "port_rules")
    done = sidestep("maps", "port_rules", "--bpffs", mesh.node.bpffs, "--limit", "2", "--output", "yaml")
    document = yaml.safe_load(done.stdout)
    assert document == {"map": "port_rules", "entries": every[:2], "left_out": len(every) - 2}
    last = text(mesh.node, "port_rules", "--limit", "2").splitlines()[-1]
    assert last == f"{len(every) - 2} more entries left out; --limit {len(every)} shows all"


def test_an_empty_map_is_told(mesh: Mesh) -> None:
    assert text(mesh.node, "interfaces") == "interfaces: no entries\n"
    for form, load in (("json", json.loads), ("yaml", yaml.safe_load)):
        done = sidestep("maps", "interfaces", "--bpffs", mesh.node.bpffs, "--output", form)
        assert load(done.stdout) == {"map": "interfaces", "entries": [], "left_out": 0}


def test_without_an_agent_maps_are_read_too(mesh: Mesh) -> None:
    mesh.node.agent.kill()
    try:
        assert "default/alpha" in {each["key"]["pod"] for each in listed(mesh.node, "pods")}
    finally:
        mesh.node.agent.start()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("prots",), "there is no map prots; give one of accelerated, addresses, arrivals, build"),
        (("../links/connect4",), "there is no map ../links/connect4; give one of"),
        (("sockets",), "only the programs can read the map sockets; give one of"),
        (
            ("pods", "--pod", "default/nobody"),
            "no enrolled pod is called default/nobody; enrolled pods: default/alpha",
        ),
        (("--pod", "default/nobody"), "no enrolled pod is called default/nobody; enrolled pods: default/alpha"),
        (("node", "--pod", "default/alpha"), "the map node has no entries of single pods; give --pod with"),
    ],
)
def test_a_wrong_name_is_told_with_the_right_ones(mesh: Mesh, argv: tuple[str, ...], said: str) -> None:
    assert one_line(sidestep("maps", *argv, "--bpffs", mesh.node.bpffs)).startswith(f"sidestep: {said}")


def test_a_map_of_another_shape_is_named(node: Node) -> None:
    node.agent.terminate()
    maps = Pins(node.bpffs).maps
    (maps / "port_rules").unlink()
    (maps / "networks").rename(maps / "port_rules")
    said = one_line(sidestep("maps", "port_rules", "--bpffs", node.bpffs))
    assert said.startswith(
        f"sidestep: {maps}/port_rules has key and value of (32, 4) bytes, this version has (16, 4); another version of "
        "sidestep is attached: use that version's command"
    )
    assert "detach" not in said  # which would end the capture of every pod


def test_a_reader_that_goes_away_is_no_error(mesh: Mesh) -> None:
    command = [sys.executable, "-m", "installer", "maps", "pods", "--bpffs", str(mesh.node.bpffs), "--output", "json"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(30)


@pytest.mark.parametrize(("form", "count"), [("table", 50_000), ("json", MANY), ("yaml", MANY)])
def test_a_large_map_is_told_in_little_memory(large: Pins, form: str, count: int, tmp_path: Path) -> None:
    many, seen = peak(large, tmp_path, "port_rules", "--output", form, "--limit", str(count))
    few, _ = peak(large, tmp_path, "port_rules", "--output", form, "--limit", "250")
    assert (many - few) < 4 << 20, f"{many >> 10} KiB rather than {few >> 10} KiB"
    if form == "json":
        document = json.loads(seen)
        assert (len(document["entries"]), document["left_out"]) == (MANY, 0)
        assert len({each["key"]["cookie"] * 65536 + each["key"]["port"] for each in document["entries"]}) == MANY
    elif form == "yaml":
        assert seen.count("\n- key:\n") == count
    else:
        assert seen.count("exclude_outbound") == count


def test_what_a_table_leaves_out_of_a_large_map_is_counted(large: Pins) -> None:
    done = sidestep("maps", "port_rules", "--bpffs", large.bpffs)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[-1] == f"{MANY - 1000} more entries left out; --limit {MANY} shows all"
    assert len(lines) == 3 + 1000 + 2  # below titles and a rule, above what is left out


@pytest.fixture(scope="module")
def large() -> Any:
    """Pins with a map of that many entries."""
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        with Tables(pins) as tables:
            for number in range(MANY):
                tables.port_rules.put(PortKey(1 + number // 50000, number % 50000), Word(PortRule.EXCLUDE_OUTBOUND))
        yield pins


def peak(pins: Pins, directory: Path, *argv: str) -> tuple[int, str]:
    """The most memory that a command has had, in bytes, and what it has printed."""
    output = directory / "output"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "installer", "maps", *argv, "--bpffs", str(pins.bpffs)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss << 10, output.read_text()
