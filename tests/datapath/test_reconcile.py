"""A round puts back what somebody has taken, loses nothing by it, and does no harm to what goes on beside it."""

import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bpf import syscalls
from bpf.attachment import attach_programs, detach_programs, is_attached
from bpf.layout import AddressKey
from bpf.libbpf import LIBBPF
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from cni.enrolment import adoption
from cni.enrolment.entries import Identity
from cni.enrolment.live import LivePolicies
from cni.errors import Code, NotCaptured
from cni.netns.namespaces import find_netns
from cni.netns.processes import Crowd, crowds
from cni.policy.annotations import CapturePolicy
from cni.protocol import NetworkConfig, Request
from tests.datapath.adopting import Parts, Running, enrol_by_cni, running
from tests.datapath.bare import Pod as Bare
from tests.datapath.bare import bare_pods
from tests.datapath.wires import Kernel, Wire, fresh_kernel, ip_command
from tests.lab.waiting import wait_until


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """Programs and maps for these tests alone: they are tampered with."""
    with fresh_kernel() as made:
        yield made


@pytest.fixture
def agent(agent: Parts) -> Iterator[Parts]:
    yield agent
    agent.reconciler.look()  # whole again for the next test


@pytest.fixture
def pod(agent: Parts, wire: Wire) -> Iterator[Running]:
    """A mesh pod in full, adopted, and a server outside."""
    wire.peer.serve("remote", "8080", uid=0)
    with running(wire) as made:
        made.serve("outbound", "15001x2")
        made.serve("inbound", "15006x2")
        agent.pods.pods = [made.pod(made.proxy)]
        assert agent.reconciler.once()["adopted"] == 1
        yield made


def is_captured(wire: Wire) -> bool:
    """Both ways, both families."""
    out = [wire.pod.dial(ip, 8080).get("who") for ip in (wire.peer.ip4, wire.peer.ip6)]
    into = [wire.peer.dial(ip, 8080).get("who") for ip in (wire.pod.ip4, wire.pod.ip6)]
    return (out, into) == (["outbound"] * 2, ["inbound"] * 2)


def detach_link(path: Path) -> None:
    """As `bpftool link detach`: the pin stays, as an empty shell."""
    with Descriptor(syscalls.open_pin(path)) as link:
        assert LIBBPF.bpf_link_detach(link.fd) == 0


def detach_links(pins: Pins) -> None:
    for path in pins.links.iterdir():
        detach_link(path)


def unpin_links(pins: Pins) -> None:
    shutil.rmtree(pins.links)


def unpin_programs(pins: Pins) -> None:
    shutil.rmtree(pins.programs)


def unpin_maps(pins: Pins) -> None:
    shutil.rmtree(pins.maps)


def unpin_some_maps(pins: Pins) -> None:
    for name in ("sockets", "listeners", "build"):
        (pins.maps / name).unlink()


def detach_steering(pins: Pins) -> None:
    for path in pins.netns.iterdir():
        detach_link(path)


def unpin_steering(pins: Pins) -> None:
    for path in pins.netns.iterdir():
        path.unlink()


def unpin_everything(pins: Pins) -> None:
    shutil.rmtree(pins.top)


TAMPERING = [
    detach_links,
    unpin_links,
    unpin_programs,
    unpin_maps,
    unpin_some_maps,
    detach_steering,
    unpin_steering,
    unpin_everything,
]


def admit(agent: Parts, bare: Bare, name: str) -> None:
    """Enrol a namespace without processes."""
    with bare.path.open() as netns:
        identity = Identity(name, name, "default", name, "net", "eth0")
        agent.admission.admit_as(identity, CapturePolicy(), netns.fileno())


@pytest.mark.parametrize("tamper", TAMPERING)
def test_what_somebody_takes_is_back_after_a_look(agent: Parts, pod: Running, tamper: Callable[[Pins], None]) -> None:
    before = agent.kernel.entries()
    maps = {name: syscalls.map_info(fd).id for name, fd in agent.kernel.tables.descriptors().items()}
    tamper(agent.kernel.pins)
    done = agent.reconciler.look()
    assert set(done) & {"restored", "steered"}
    assert is_attached(agent.kernel.pins)
    assert agent.kernel.entries() == before
    assert {name: pinned_id(agent.kernel.pins, name) for name in maps} == maps
    assert is_captured(pod.wire)
    assert agent.reconciler.once() == {}


def pinned_id(pins: Pins, name: str) -> int:
    with Descriptor(syscalls.open_pin(pins.maps / name)) as pinned:
        return int(syscalls.map_info(pinned.fd).id)


@pytest.mark.parametrize("tamper", [detach_steering, unpin_steering])
def test_a_pod_that_is_steered_again_is_told(agent: Parts, pod: Running, tamper: Callable[[Pins], None]) -> None:
    agent.events.events.clear()
    tamper(agent.kernel.pins)
    agent.reconciler.look()
    ((reason, message),) = agent.events.events
    assert (reason, message.partition(":")[0]) == ("CaptureRepaired", "inbound capture is restored")


@pytest.mark.parametrize("tamper", [unpin_maps, unpin_some_maps, unpin_programs])
def test_a_live_connection_keeps_its_original_destination(
    agent: Parts, pod: Running, tamper: Callable[[Pins], None]
) -> None:
    """The storage of sockets is in a map that no descriptor of the agent's holds."""
    code = """
import json, socket, sys
s = socket.create_connection((sys.argv[1], 8080))
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(s.getpeername()), flush=True)
"""
    client = pod.wire.pod.start(["/usr/bin/python3", "-I", "-S", "-c", code, str(pod.wire.peer.ip4)], 1000)
    tamper(agent.kernel.pins)
    agent.reconciler.look()
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write("go on\n")
    client.stdin.flush()
    assert json.loads(client.stdout.readline()) == [str(pod.wire.peer.ip4), 8080]


def add(agent: Parts, pod: Running) -> None:
    """As the runtime does it."""
    config = NetworkConfig.model_validate({"cniVersion": "1.0.0", "name": "net", "type": "sidestep-cni"})
    names = f"K8S_POD_NAME=pod;K8S_POD_NAMESPACE=default;K8S_POD_UID={pod.uid}"
    request = Request(version=1, command="ADD", container_id="c", ifname="eth0", netns="x", args=names, config=config)
    with pod.wire.pod.path.open() as netns:
        agent.verbs.run(request, netns.fileno())


@pytest.mark.claim("that ADD is refused until then")
@pytest.mark.parametrize("tamper", [detach_links, unpin_links])
def test_an_add_that_would_leave_a_pod_open_fails_and_has_it_put_right(
    agent: Parts, pod: Running, tamper: Callable[[Pins], None]
) -> None:
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    tamper(agent.kernel.pins)
    with pytest.raises(NotCaptured, match=r"default/pod.* would run uncaptured") as refused:
        add(agent, pod)
    assert refused.value.code == Code.TRY_AGAIN_LATER
    with agent.reconciler.running(seconds=3600):  # no round is due: what adopts pods is the call
        wait_until(lambda: len(agent.enrolments) == 1, "the pod to be adopted, as it runs", 30)
    assert is_attached(agent.kernel.pins)
    add(agent, pod)
    assert is_captured(pod.wire)


def test_what_a_refused_add_has_written_is_taken_back(agent: Parts, pod: Running) -> None:
    agent.pods.pods = [pod.pod(pod.proxy)]
    detach_links(agent.kernel.pins)
    before = agent.kernel.entries()
    with pytest.raises(NotCaptured):
        add(agent, pod)  # once more of what is enrolled, as for a second interface
    assert agent.kernel.entries() == before
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    empty = agent.kernel.entries()
    with pytest.raises(NotCaptured):
        add(agent, pod)
    assert agent.kernel.entries() == empty


def test_maps_that_were_replaced_behind_our_back_are_ours_again(agent: Parts, pod: Running) -> None:
    before = agent.kernel.entries()
    detach_programs(agent.kernel.pins)
    attach_programs(agent.kernel.pins, agent.kernel.cgroup)
    assert not is_captured(pod.wire)
    agent.reconciler.look()
    assert agent.kernel.entries() == before
    assert is_captured(pod.wire)


@pytest.mark.parametrize("table", ["pods", "addresses", "port_rules", "networks"])
def test_entries_that_somebody_removes_are_back_after_a_round(agent: Parts, pod: Running, table: str) -> None:
    excluded = {"traffic.sidecar.istio.io/excludeOutboundIPRanges": "192.0.2.0/24"}
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    agent.pods.pods = [pod.pod(pod.proxy, **excluded)]
    agent.reconciler.once()
    before = agent.kernel.entries()
    removed = next(key for key in getattr(agent.kernel.tables, table).every_key())
    getattr(agent.kernel.tables, table).remove(removed)
    agent.events.events.clear()
    assert agent.reconciler.once() == {"mended": 1}
    assert [reason for reason, _ in agent.events.events] == ["CaptureRepaired"]
    assert agent.kernel.entries() == before
    assert is_captured(pod.wire)
    assert agent.enrolments.of_attachment(pod.sandbox, "eth0") == [pod.wire.sandbox.cookie]


def test_a_pod_whose_annotations_are_refused_by_now_is_not_mended_and_keeps_nobody_else_from_it(
    agent: Parts, pod: Running, make_wire: Callable[[], Wire]
) -> None:
    with running(make_wire()) as other:
        agent.pods.pods = [pod.pod(pod.proxy), other.pod(other.proxy)]
        assert agent.reconciler.once()["adopted"] == 1
        bad = {"traffic.sidecar.istio.io/excludeOutboundPorts": "80-90"}
        agent.pods.pods = [pod.pod(pod.proxy, **bad), other.pod(other.proxy)]
        for key in list(agent.kernel.tables.port_rules.every_key()):
            agent.kernel.tables.port_rules.remove(key)
        assert agent.reconciler.once() == {"mended": 1}
        assert list(agent.enrolments.damaged()) == [pod.wire.sandbox.cookie]


def test_an_address_that_was_missed_is_found(agent: Parts, pod: Running) -> None:
    """Nobody follows in this test."""
    ip_command("-n", pod.wire.pod.path.name, "addr", "add", "192.0.2.5/32", "dev", "eth0")
    key = AddressKey.of(pod.wire.sandbox.cookie, ip_address("192.0.2.5"))
    assert agent.kernel.tables.addresses.get(key) is None
    agent.reconciler.once()
    assert agent.kernel.tables.addresses.get(key) is not None


def collect(agent: Parts) -> None:
    config = NetworkConfig.model_validate(
        {"cniVersion": "1.1.0", "name": "other", "type": "sidestep-cni", "cni.dev/valid-attachments": []}
    )
    agent.verbs.run(
        Request(version=1, command="GC", container_id="", ifname="", netns="", args="", config=config), None
    )


@pytest.mark.parametrize("tamper", [detach_steering, unpin_steering])
def test_gc_does_not_take_a_live_pod_for_a_dead_one(agent: Parts, pod: Running, tamper: Callable[[Pins], None]) -> None:
    tamper(agent.kernel.pins)
    collect(agent)
    assert agent.kernel.entries()["pods"] == 1
    assert is_captured(pod.wire)


def test_what_a_dead_namespace_left_is_gone_after_a_look(agent: Parts) -> None:
    empty = agent.kernel.entries()
    with bare_pods() as make:
        (bare,) = make(1)
        bare.ip("addr add 198.51.100.7/32 dev lo")
        admit(agent, bare, "bare")
        assert agent.kernel.entries()["pods"] == 1
    wait_until(lambda: bool(agent.enrolments.unsteered()), "the namespace to be gone", 5)
    assert agent.reconciler.look() == {"reclaimed": 1}
    assert agent.kernel.entries() == empty


def test_a_pod_that_is_not_listed_stays_enrolled_while_it_lives(agent: Parts, pod: Running) -> None:
    agent.pods.pods = []
    for _ in range(3):
        assert agent.reconciler.once() == {}
    assert is_captured(pod.wire)


def test_rounds_beside_add_and_del_leave_what_those_say(agent: Parts, wire: Wire) -> None:
    empty = agent.kernel.entries()
    stop = threading.Event()

    def rounds() -> None:
        while not stop.is_set():
            agent.reconciler.once()

    with running(wire) as made:
        api_pod = made.pod(made.proxy)
        agent.pods.pods = [api_pod]
        thread = threading.Thread(target=rounds)
        thread.start()
        try:
            for number in range(40):
                enrol_by_cni(agent, wire, api_pod, f"mine{number}")
                found = agent.enrolments.of_attachment(f"mine{number}", "eth0")
                assert found == [wire.sandbox.cookie]
                agent.enrolments.remove(wire.sandbox.cookie)
        finally:
            stop.set()
            thread.join()
        agent.reconciler.once()
        assert agent.kernel.entries()["pods"] == 1  # it runs and is listed
        agent.enrolments.remove(wire.sandbox.cookie)
        assert agent.kernel.entries() == empty


def test_a_refusal_is_told_once(agent: Parts, pod: Running) -> None:
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    agent.events.events.clear()
    bad = {"traffic.sidecar.istio.io/excludeOutboundPorts": "80-90"}
    agent.pods.pods = [pod.pod(pod.proxy, **bad)]
    for _ in range(3):
        assert agent.reconciler.once() == {"refused": 1}
    ((reason, message),) = agent.events.events
    assert reason == "CaptureRefused"
    assert '"80-90" is not a port' in message


def test_a_change_of_denied_ports_that_nobody_was_told_of_is_found(agent: Parts, pod: Running) -> None:
    """As when it comes between an ADD's look at its Pod and the enrolment."""
    denials = LivePolicies(agent.enrolments, agent.events)
    agent.reconciler.follow = lambda: denials.look(agent.pods)
    agent.events.events.clear()
    agent.pods.pods = [pod.pod(pod.proxy, **{"sidestep.io/deny-outbound-ports": "8080"})]
    denials.changed(None, pod.pod(pod.proxy, uid="not enrolled yet"))
    for _ in range(2):
        agent.reconciler.once()
    assert [reason for reason, _ in agent.events.events] == ["DeniedPortsChanged"]
    assert "error" in pod.wire.pod.dial(pod.wire.peer.ip4, 8080)
    agent.pods.pods = [pod.pod(pod.proxy)]
    agent.reconciler.once()
    assert is_captured(pod.wire)


def test_what_is_somebody_elses_case_is_left_to_them(agent: Parts, pod: Running) -> None:
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    agent.reconciler.claims = lambda _: True
    assert agent.reconciler.once() == {}
    agent.reconciler.claims = lambda _: False
    assert agent.reconciler.once()["adopted"] == 1


def test_idle_pods_cost_one_walk_of_proc_at_most(agent: Parts, pod: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Path] = []

    def counted(proc: Path) -> dict[int, Crowd]:
        walks.append(proc)
        return crowds(proc)

    def sought(cookies: Collection[int], inodes: Collection[int], proc: Path) -> Any:
        walks.append(proc)
        return find_netns(cookies, inodes, proc)

    monkeypatch.setattr(adoption, "crowds", counted)
    monkeypatch.setattr(adoption, "find_netns", sought)
    agent.reconciler.once()
    assert walks == []
    with bare_pods() as make:
        for number, bare in enumerate(make(20)):
            bare.ip(f"addr add 198.51.100.{number}/32 dev lo")
            admit(agent, bare, f"bare{number}")
        agent.reconciler.once()
        assert len(walks) == 1
        agent.reconciler.look()
        assert len(walks) == 1
