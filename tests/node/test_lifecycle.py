"""ADD, DEL, CHECK, GC and STATUS through the real shim and agent: many times, at once, and out of order."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from bpf.layout import OwnAddressEntry
from bpf.pins import Pins
from bpf.tables import Tables
from tests.lab.chain import Attachment, CniFailed
from tests.lab.node import Agent, Node
from tests.lab.sandboxes import PREVIOUS, Sandboxes
from tests.lab.userns import FIRST, mapped_netns
from tests.lab.waiting import wait_until

CYCLES = int(os.environ.get("CYCLES", "200"))  # `make nightly`: a thousand


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """A node for the tests that leave it as they have found it."""
    with Node() as node:
        yield node


@pytest.fixture
def sandboxes(shared: Node) -> Iterator[Sandboxes]:
    """Two namespaces of the test's own. Their pods are forgotten afterwards, and nothing else may be left."""
    empty = shared.entries()
    made = Sandboxes(shared, 2)
    yield made
    made.remove()
    wait_until(lambda: shared.entries() == empty, "the test's pods to leave nothing")


@pytest.fixture
def own(node: Node) -> Sandboxes:
    """The same on a node of the test's own."""
    return Sandboxes(node, 2)


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_cycles_one_after_the_other_and_fifty_at_once_leave_nothing(node: Node) -> None:
    pods = Sandboxes(node, 50)
    descriptors = Path(f"/proc/{node.agent.pid}/fd")
    empty = node.entries()
    with ThreadPoolExecutor(50) as at_once:
        list(at_once.map(partial(pods.cycle, times=4), range(50)))  # every worker of the agent has run now
        open_before, resident_before = len(list(descriptors.iterdir())), resident_kib(node.agent.pid)
        list(at_once.map(pods.cycle, range(50)))
    with ThreadPoolExecutor(4) as runtime:
        list(runtime.map(partial(pods.cycle, times=CYCLES // 4), range(4)))
    assert node.entries() == empty
    assert len(list(descriptors.iterdir())) == open_before
    # the heap itself grows in steps of a MiB; one page lost in each of `make nightly`'s thousand cycles would be four
    assert resident_kib(node.agent.pid) - resident_before < 3072


def test_fifty_pods_at_once_are_all_enrolled(shared: Node) -> None:
    pods = Sandboxes(shared, 50)
    attachments = [pods.attachment(number) for number in range(50)]
    with ThreadPoolExecutor(50) as at_once:
        list(at_once.map(lambda each: pods.run("ADD", each), attachments))
    counts = shared.entries()
    assert (counts["pods"], counts["links"]) == (50, 50)
    for attachment in attachments:
        pods.run("CHECK", attachment)
    pods.remove()
    wait_until(lambda: shared.entries()["links"] == 0, "all to be forgotten")


def test_repeating_an_add_is_harmless(sandboxes: Sandboxes) -> None:
    attachment = sandboxes.attachment(0)
    sandboxes.run("ADD", attachment)
    once = sandboxes.node.entries()
    assert sandboxes.run("ADD", attachment) == PREVIOUS
    assert sandboxes.node.entries() == once


def test_the_previous_result_comes_back_unchanged_for_pods_outside_of_the_mesh_too(sandboxes: Sandboxes) -> None:
    (sandboxes.node.pods_dir / "plain.yaml").write_text(
        "kind: Pod\nmetadata: {name: plain}\nspec: {containers: [{name: app}]}\n"
    )
    assert sandboxes.run("ADD", sandboxes.attachment(0, "plain")) == PREVIOUS
    not_kubernetes = replace(sandboxes.attachment(0), pod={})
    assert sandboxes.run("ADD", not_kubernetes) == PREVIOUS
    assert sandboxes.node.entries()["pods"] == 0


def test_del_works_without_the_namespace_and_twice(sandboxes: Sandboxes) -> None:
    empty = sandboxes.node.entries()
    attachment = sandboxes.attachment(0)
    sandboxes.run("ADD", attachment)
    for netns in (None, None, Path("/run/netns/never-was"), Path("/etc/hostname")):
        sandboxes.run("DEL", replace(attachment, netns=netns))
        assert sandboxes.node.entries() == empty
    sandboxes.run("DEL", sandboxes.attachment(1))


def test_a_late_del_of_an_earlier_container_leaves_the_new_one_alone(sandboxes: Sandboxes) -> None:
    earlier, later = sandboxes.attachment(0), sandboxes.attachment(0)
    sandboxes.run("ADD", earlier)
    sandboxes.run("ADD", later)
    sandboxes.run("DEL", earlier)
    sandboxes.run("CHECK", later)


def test_del_of_another_interface_leaves_the_pod_enrolled(sandboxes: Sandboxes) -> None:
    attachment = sandboxes.attachment(0)
    sandboxes.run("ADD", attachment)
    sandboxes.run("DEL", replace(attachment, ifname="net1"))
    sandboxes.run("CHECK", attachment)


def test_check_names_what_differs(own: Sandboxes) -> None:
    sandboxes = own
    attachment = sandboxes.attachment(0)
    with pytest.raises(CniFailed, match=r"no entry in pods for default/mesh|no inbound steering") as failed:
        sandboxes.run("CHECK", attachment)
    assert failed.value.code == 103
    sandboxes.run("ADD", attachment)
    sandboxes.run("CHECK", attachment)
    with Tables(Pins(sandboxes.node.bpffs)) as tables:
        (key,) = (each for each in tables.addresses.every_key() if each.address.ip() == IPv4Address("10.0.0.1"))
        tables.addresses.put(key, OwnAddressEntry(99))
    with pytest.raises(CniFailed, match=r"address 10\.0\.0\.1 should be registered"):
        sandboxes.run("CHECK", attachment)


def test_gc_forgets_what_the_runtime_no_longer_lists(sandboxes: Sandboxes) -> None:
    kept, gone = sandboxes.attachment(0), sandboxes.attachment(1)
    for each in (kept, gone):
        sandboxes.run("ADD", each)
    chain = replace(sandboxes.chain, conflist={**sandboxes.chain.conflist, "cniVersion": "1.1.0"})
    valid = {"cni.dev/valid-attachments": [{"containerID": kept.container_id, "ifname": "eth0"}]}
    nobody = Attachment("", None, {}, "")
    chain.run("GC", {**sandboxes.plugin, **valid}, nobody)
    assert sandboxes.node.entries()["pods"] == 1
    sandboxes.run("CHECK", kept)


def test_gc_leaves_other_networks_alone(sandboxes: Sandboxes) -> None:
    sandboxes.run("ADD", sandboxes.attachment(0))
    chain = replace(sandboxes.chain, conflist={**sandboxes.chain.conflist, "cniVersion": "1.1.0", "name": "other"})
    chain.run("GC", {**sandboxes.plugin, "cni.dev/valid-attachments": []}, Attachment("", None, {}, ""))
    assert sandboxes.node.entries()["pods"] == 1


def test_status_is_good_while_the_agent_serves_and_50_when_it_does_not(own: Sandboxes) -> None:
    sandboxes = own
    chain = replace(sandboxes.chain, conflist={**sandboxes.chain.conflist, "cniVersion": "1.1.0"})
    nobody = Attachment("", None, {}, "")
    assert chain.run("STATUS", sandboxes.plugin, nobody) is None
    (Pins(sandboxes.node.bpffs).links / "connect4").unlink()
    with pytest.raises(CniFailed, match="not attached") as detached:
        chain.run("STATUS", sandboxes.plugin, nobody)
    sandboxes.node.agent.terminate()
    with pytest.raises(CniFailed, match="is the sidestep agent running") as away:
        chain.run("STATUS", sandboxes.plugin, nobody)
    assert (detached.value.code, away.value.code) == (50, 50)


def test_what_dead_pods_left_is_gone_when_the_agent_is_back(own: Sandboxes) -> None:
    sandboxes = own
    sandboxes.run("ADD", sandboxes.attachment(0))
    sandboxes.run("ADD", sandboxes.attachment(1))
    sandboxes.node.agent.kill()
    subprocess.run(["ip", "netns", "del", sandboxes.paths[0].name], check=True)
    sandboxes.node.wait_for_dead_links(1)
    sandboxes.node.agent.start()
    counts = sandboxes.node.entries()
    assert (counts["pods"], counts["links"], counts["addresses"]) == (1, 1, counts["addresses"])


BAD_ANNOTATIONS = {
    "traffic.sidecar.istio.io/excludeOutboundPorts": "80-90",
    "traffic.sidecar.istio.io/includeInboundPorts": "http",
    "traffic.sidecar.istio.io/includeOutboundIPRanges": "10.0.0.0",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.0.0.0/8, 11.0.0.0/8",
    "sidecar.istio.io/interceptionMode": "NONE",
}


@pytest.mark.claim("an annotation is invalid")
@pytest.mark.parametrize("annotation", BAD_ANNOTATIONS)
def test_an_invalid_annotation_is_named_with_its_value(sandboxes: Sandboxes, annotation: str) -> None:
    empty = sandboxes.node.entries()
    sandboxes.manifest("bad", **{annotation: BAD_ANNOTATIONS[annotation]})
    with pytest.raises(CniFailed) as failed:
        sandboxes.run("ADD", sandboxes.attachment(0, "bad"))
    assert failed.value.code == 100
    assert annotation in failed.value.message
    assert BAD_ANNOTATIONS[annotation].split(",")[-1] in failed.value.message
    assert sandboxes.node.entries() == empty


def test_a_pod_nobody_knows_fails_closed_and_may_be_tried_again(sandboxes: Sandboxes) -> None:
    with pytest.raises(CniFailed, match="default/unknown") as failed:
        sandboxes.run("ADD", sandboxes.attachment(0, "unknown"))
    assert failed.value.code == 11
    assert sandboxes.node.entries()["pods"] == 0


def test_the_hosts_own_namespace_is_refused(sandboxes: Sandboxes) -> None:
    with pytest.raises(CniFailed, match="host's own network namespace") as failed:
        sandboxes.run("ADD", replace(sandboxes.attachment(0), netns=Path(f"/proc/{sandboxes.node.agent.pid}/ns/net")))
    assert failed.value.code == 101


def test_a_namespace_without_an_address_is_refused(sandboxes: Sandboxes) -> None:
    subprocess.run(["ip", "-n", sandboxes.paths[0].name, "addr", "flush", "dev", "eth0"], check=True)
    with pytest.raises(CniFailed, match="no valid local IP address found") as failed:
        sandboxes.run("ADD", sandboxes.attachment(0))
    assert failed.value.code == 101


def test_unknown_cni_args_are_named(sandboxes: Sandboxes) -> None:
    attachment = replace(sandboxes.attachment(0), pod={"K8S_POD_NAME": "mesh", "IgnoreUnknown": "0", "COLOUR": "red"})
    with pytest.raises(CniFailed, match="CNI_ARGS: unknown keys COLOUR") as failed:
        sandboxes.run("ADD", attachment)
    assert failed.value.code == 4


@pytest.mark.claim("see or change maps, programs or the socket")
def test_another_user_cannot_reach_the_socket(sandboxes: Sandboxes) -> None:
    run_dir = sandboxes.node.run_dir
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert (run_dir / "cni.sock").stat().st_mode & 0o777 == 0o600
    probe = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    refused = subprocess.run(
        ["/usr/bin/python3", "-c", probe, run_dir / "cni.sock"], user=1000, group=1000, capture_output=True, text=True
    )
    assert "PermissionError" in refused.stderr


def test_a_second_agent_on_the_same_directory_is_refused(node: Node) -> None:
    second = Agent(node)
    with pytest.raises(RuntimeError, match="another agent serves"):
        second.start()
    node.agent.kill()
    second.start()
    second.terminate()


def test_the_proxys_ids_are_those_of_the_pods_user_namespace(sandboxes: Sandboxes) -> None:
    with mapped_netns() as netns, Tables(Pins(sandboxes.node.bpffs)) as tables:
        commands = (
            "ip link add eth0 type bridge; ip addr add 10.9.9.9/32 dev eth0; ip link set eth0 up; ip link set lo up"
        )
        subprocess.run(["nsenter", f"--net={netns}", "sh", "-c", commands], check=True)
        attachment = replace(sandboxes.attachment(0), netns=netns)
        sandboxes.run("ADD", attachment)
        (entry,) = (value for _, value in tables.pods.every())
        assert (entry.proxy_uid, entry.proxy_gid) == (FIRST + 1337, FIRST + 1337)
        sandboxes.run("CHECK", attachment)
        sandboxes.run("DEL", attachment)
