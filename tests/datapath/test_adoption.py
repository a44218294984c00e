"""Pods that ran before they were enrolled: how they are found, their proxies, and what CNI calls make of them."""

import errno
import os
import secrets
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.rtnl import RTM_GETADDR

from bpf import links
from bpf.layout import FAMILY_SLOTS, LISTENER_SLOTS, Cookie, ListenerKey, PodFlags
from cni.enrolment.hearing import Hearing
from cni.netns import listeners as proxies
from cni.netns.dumps import Dump
from cni.netns.proc_net import SocketRow, table_of_sockets
from cni.netns.rtnl import Rtnl
from cni.netns.sock_diag import Diag
from cni.protocol import NetworkConfig, Request
from tests.datapath.adopting import LATE, NOBODYS, WAYS, Parts, Running, enrol_by_cni, parts, running
from tests.datapath.bare import bare_pods, open_descriptors
from tests.datapath.wires import APP, PROXY, Kernel, Wire, ip_command
from tests.lab.inside import PYTHON, popen
from tests.lab.waiting import wait_until

both_ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def pod(wire: Wire) -> Iterator[Running]:
    """Its sandbox runs, and the peer's server."""
    wire.peer.serve("remote", "8080", uid=0)
    with running(wire) as made:
        yield made


def listeners(wire: Wire) -> int:
    return sum(key.cookie == wire.sandbox.cookie for key in wire.kernel.tables.listeners.every_key())


def mesh(pod: Running, workers: int = 1, uid: int = PROXY, gid: int | None = None) -> None:
    pod.serve("outbound", f"15001x{workers}", uid=uid, gid=gid)
    pod.serve("inbound", f"15006x{workers}", uid=uid, gid=gid)
    pod.wire.pod.serve("app", "8080")


@pytest.mark.parametrize("workers", [1, 4])
def test_new_connections_are_captured_both_ways_and_in_both_families(agent: Parts, pod: Running, workers: int) -> None:
    mesh(pod, workers)
    wire = pod.wire
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert (outcome.problem, outcome.left_alone, outcome.listeners) == ("", "", 2 * min(workers, FAMILY_SLOTS))
    for ip in (wire.peer.ip4, wire.peer.ip6):
        seen = wire.pod.dial(ip, 8080)
        assert (seen["who"], seen["original"], seen["client_peer"]) == ("outbound", [str(ip), 8080], [str(ip), 8080])
    for ip in (wire.pod.ip4, wire.pod.ip6):
        seen = wire.peer.dial(ip, 8080)
        assert (seen["who"], seen["original"]) == ("inbound", [str(ip), 8080])


def test_inbound_survives_the_exit_of_a_worker(agent: Parts, pod: Running) -> None:
    wire = pod.wire
    inbound = pod.serve("inbound", "15006x3")
    agent.adopt(pod.pod(pod.proxy))
    assert listeners(wire) == 4
    assert inbound.stdin is not None
    assert inbound.stdout is not None
    inbound.stdin.write("close 15006 0\n")
    inbound.stdin.flush()
    assert inbound.stdout.readline() == "closed\n"
    wait_until(lambda: listeners(wire) == 2, "the closed sockets to leave", 3)
    for ip in (wire.pod.ip4, wire.pod.ip6):
        assert [wire.peer.dial(ip, 8080)["who"] for _ in range(3)] == ["inbound"] * 3


@both_ways
def test_with_many_workers_both_families_have_slots(agent: Parts, pod: Running) -> None:
    wire = pod.wire
    pod.serve("inbound", "15006x20")
    agent.adopt(pod.pod(pod.proxy))
    assert listeners(wire) == LISTENER_SLOTS
    assert [wire.peer.dial(ip, 8080)["who"] for ip in (wire.pod.ip4, wire.pod.ip6)] == ["inbound", "inbound"]


@pytest.mark.parametrize("kernel_has_diag", [True, False])
def test_listeners_are_found_with_and_without_tcp_diag(
    agent: Parts, pod: Running, monkeypatch: pytest.MonkeyPatch, kernel_has_diag: bool
) -> None:
    mesh(pod, 2)
    asked, read = [], []

    class Asked(Diag):
        def sockets(self, *states: int, storage: int | None = None) -> Iterator[Any]:
            asked.append(states)
            if not kernel_has_diag:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return super().sockets(*states)

    def read_table(name: str) -> Iterator[SocketRow]:
        read.append(name)
        return table_of_sockets(name)

    monkeypatch.setattr(proxies, "Diag", Asked)
    monkeypatch.setattr(proxies, "table_of_sockets", read_table)
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert outcome.listeners == 4
    # net/tcp takes a hundred times as long: only where there is nothing else
    assert asked
    assert set(read) == (set() if kernel_has_diag else {"tcp", "tcp6"})


@both_ways
def test_a_socket_takes_one_slot_however_often_it_is_found(agent: Parts, pod: Running) -> None:
    pod.serve("inbound", "15006x2")
    api_pod = pod.pod(pod.proxy)
    agent.adopt(api_pod)
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    again = agent.adopt(api_pod)
    assert again is not None
    assert (again.problem, again.listeners) == ("", 0)
    assert listeners(pod.wire) == 4


@pytest.mark.parametrize("version", [4, 6])
def test_a_socket_that_was_bound_before_and_listens_later_is_found(agent: Parts, pod: Running, version: int) -> None:
    """Envoy binds when its configuration comes and listens when its workers start, seconds later."""
    wire = pod.wire
    late = pod.container(pod.proxy).start([*PYTHON, LATE, str(version), "15006"], PROXY)
    agent.pods.pods = [pod.pod(pod.proxy)]
    assert agent.reconciler.once()["adopted"] == 1
    ip = wire.pod.ip4 if version == 4 else wire.pod.ip6
    assert agent.reconciler.look() == {}
    assert late.stdin is not None
    assert late.stdout is not None
    late.stdin.write("go\n")
    late.stdin.flush()
    assert late.stdout.readline() == "listening\n"
    assert wire.peer.dial(ip, 8080) == {"error": "Connection refused"}
    assert agent.reconciler.look() == {"heard": 1}
    assert wire.peer.dial(ip, 8080)["who"] == "late"
    assert agent.reconciler.look() == {}


@both_ways
def test_somebody_elses_listener_gets_nothing(agent: Parts, pod: Running) -> None:
    wire = pod.wire
    pod.serve("impostor", "15006", uid=APP)
    wire.pod.serve("app", "8080")
    agent.adopt(pod.pod(pod.proxy))
    assert listeners(wire) == 0
    assert wire.peer.dial(wire.pod.ip4, 8080) == {"error": "Connection refused"}


@both_ways
@pytest.mark.parametrize(("in_proxy", "count"), [(True, 2), (False, 0)])
def test_a_strict_pods_listeners_are_those_of_the_proxys_container(
    agent: Parts, pod: Running, in_proxy: bool, count: int
) -> None:
    container = pod.proxy if in_proxy else secrets.token_hex(32)
    pod.container(container).serve("inbound", "15006", uid=PROXY)
    agent.adopt(pod.pod(pod.proxy, **{"sidestep.io/strict-proxy": "true"}))
    assert listeners(pod.wire) == count


@both_ways
def test_a_transparent_proxy_is_known_by_its_group(agent: Parts, pod: Running) -> None:
    mesh(pod, uid=0, gid=PROXY)
    wire = pod.wire
    outcome = agent.adopt(pod.pod(pod.proxy, **{"sidecar.istio.io/interceptionMode": "TPROXY"}))
    assert outcome is not None
    assert (outcome.problem, outcome.listeners) == ("", 2)
    for ip in (wire.pod.ip4, wire.pod.ip6):
        assert wire.peer.dial(ip, 8080)["who"] == "inbound"
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"


@both_ways
@pytest.mark.parametrize("listens", [True, False])
def test_early_outbound_ends_where_the_proxy_listens_already(agent: Parts, pod: Running, listens: bool) -> None:
    if listens:
        pod.serve("outbound", "15001")
    agent.adopt(pod.pod(pod.proxy, **{"sidestep.io/early-outbound": "allow"}))
    cookie = pod.wire.sandbox.cookie
    entry = agent.enrolments.entry(cookie)
    assert entry is not None
    assert PodFlags.EARLY_OUTBOUND in PodFlags(entry.flags)
    assert (agent.kernel.tables.started.get(Cookie(cookie)) is not None) is listens
    assert pod.wire.pod.dial(pod.wire.peer.ip4, 8080)["who"] == ("outbound" if listens else "remote")


def test_a_namespace_below_the_pods_is_not_taken_for_it(agent: Parts, pod: Running) -> None:
    """As a browser's sandbox in the application's container makes one."""
    container = pod.container(pod.proxy)
    container.start(["unshare", "--net", "sh", "-c", "echo ready; exec cat"], 0)
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert outcome.cookie == pod.wire.sandbox.cookie


def test_a_pod_is_found_by_its_uid_while_its_containers_are_down(agent: Parts, pod: Running) -> None:
    """As while istio-validation waits for its next attempt: there is the sandbox's process alone."""
    uid = str(uuid.uuid4())
    slice_ = pod.wire.kernel.cgroup / f"kubepods-besteffort-pod{uid.replace('-', '_')}.slice"
    cgroup = slice_ / f"cri-containerd-{secrets.token_hex(32)}.scope"
    cgroup.mkdir(parents=True)
    (cgroup / "cgroup.procs").write_text(str(pod.namespaces[pod.sandbox].started[0].pid))
    try:
        outcome = agent.adopt(pod.pod(secrets.token_hex(32), uid=uid))
        assert outcome is not None
        assert outcome.cookie == pod.wire.sandbox.cookie
        assert agent.enrolments.of_attachment(cgroup.name[15:-6], "eth0") == [outcome.cookie]
    finally:
        pod.stop()
        for each in (cgroup, slice_):
            each.rmdir()


def test_a_pod_of_another_test_is_not_seen(agent: Parts, pod: Running) -> None:
    """It may have the address that this test's Pod says is its own."""
    with bare_pods() as make:
        (bare,) = make(1)
        bare.ip(f"addr add {NOBODYS}/32 dev lo")
        stranger = popen(bare.path, None, ["sleep", "60"], 0, 0)
        try:
            assert agent.adopt(pod.pod(secrets.token_hex(32))) is None
        finally:
            stranger.kill()
            stranger.wait()


def test_a_pod_without_processes_is_not_found(agent: Parts, pod: Running) -> None:
    assert agent.adopt(pod.pod(secrets.token_hex(32))) is None


@pytest.mark.parametrize("version", [4, 6])
def test_a_pod_whose_cgroups_tell_nothing_is_found_by_its_address(agent: Parts, pod: Running, version: int) -> None:
    ip = pod.wire.pod.ip4 if version == 4 else pod.wire.pod.ip6
    outcome = agent.adopt(pod.pod(secrets.token_hex(32), ip=ip))
    assert outcome is not None
    assert outcome.cookie == pod.wire.sandbox.cookie


def test_looking_for_an_address_asks_each_namespace_for_its_addresses_alone(
    agent: Parts, pod: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A namespace that routes for others has thousands of routes, and two interfaces; so has this pod."""
    name = pod.wire.pod.path.name
    for command in ("link add eth1 type bridge", "addr add 192.0.2.1/24 dev eth1", "link set eth1 up"):
        ip_command("-n", name, *command.split())
    asked, dump = [], Rtnl._dump

    def counted(self: Rtnl, kind: int, head: bytes, limit: int) -> Dump:
        asked.append(kind)
        return dump(self, kind, head, limit)

    monkeypatch.setattr(Rtnl, "_dump", counted)
    assert agent.adopt(pod.pod(secrets.token_hex(32))) is None
    assert asked == [RTM_GETADDR] * 2  # the pod and its peer


def delete(agent: Parts, container: str, ifname: str = "eth0", netns: Path | None = None) -> None:
    config = NetworkConfig.model_validate({"cniVersion": "1.0.0", "name": "net", "type": "sidestep-cni"})
    request = Request(
        version=1, command="DEL", container_id=container, ifname=ifname, netns=str(netns or ""), args="", config=config
    )
    if netns is None:
        agent.verbs.run(request, None)
        return
    with netns.open() as opened:
        agent.verbs.run(request, opened.fileno())


def test_del_finds_an_adopted_pod_by_its_sandbox(agent: Parts, pod: Running) -> None:
    empty = agent.kernel.entries()
    agent.adopt(pod.pod(pod.proxy))
    delete(agent, secrets.token_hex(32))
    delete(agent, pod.sandbox, "net1")
    delete(agent, pod.sandbox, "net1", pod.wire.pod.path)
    assert agent.kernel.entries()["pods"] == 1
    delete(agent, pod.sandbox)
    assert agent.kernel.entries() == empty


def test_del_finds_an_adopted_pod_by_its_namespace(agent: Parts, pod: Running) -> None:
    """CRI-O has no process for a sandbox, so nothing tells its id."""
    empty = agent.kernel.entries()
    agent.adopt(pod.pod(pod.sandbox))
    delete(agent, secrets.token_hex(32))
    assert agent.kernel.entries()["pods"] == 1
    delete(agent, secrets.token_hex(32), netns=pod.wire.pod.path)
    assert agent.kernel.entries() == empty


def test_del_with_a_namespace_leaves_what_another_container_has_enrolled(agent: Parts, pod: Running) -> None:
    enrol_by_cni(agent, pod.wire, pod.pod(), "mine")
    delete(agent, "earlier", netns=pod.wire.pod.path)
    assert agent.kernel.entries()["pods"] == 1
    delete(agent, "mine", netns=Path("/etc/hostname"))
    assert agent.kernel.entries()["pods"] == 0


def test_what_add_has_enrolled_is_not_adopted_over(agent: Parts, pod: Running) -> None:
    enrol_by_cni(agent, pod.wire, pod.pod(), "mine")
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert outcome.left_alone == "it was enrolled meanwhile"
    assert agent.enrolments.of_attachment("mine", "eth0") == [pod.wire.sandbox.cookie]


def test_an_add_after_the_adoption_makes_the_pod_its_own(agent: Parts, pod: Running) -> None:
    agent.adopt(pod.pod(pod.proxy))
    once = agent.kernel.policies()
    enrol_by_cni(agent, pod.wire, pod.pod(), "mine")
    # IPv6 settles meanwhile, and the pod has a route more
    assert agent.kernel.policies() | {"routes": 0} == once | {"routes": 0}
    assert agent.enrolments.of_attachment(pod.sandbox, "eth0", pod.wire.sandbox.cookie) == []
    delete(agent, "mine")
    assert agent.kernel.entries()["pods"] == 0


def test_check_finds_nothing_wrong_with_an_adopted_pod(agent: Parts, pod: Running) -> None:
    agent.pods.pods = [pod.pod(pod.proxy)]
    agent.adopt(agent.pods.pods[0])
    config = NetworkConfig.model_validate({"cniVersion": "1.0.0", "name": "net", "type": "sidestep-cni"})
    names = f"K8S_POD_NAME=pod;K8S_POD_NAMESPACE=default;K8S_POD_UID={pod.uid}"
    request = Request(
        version=1, command="CHECK", container_id="any", ifname="eth0", netns="x", args=names, config=config
    )
    with pod.wire.pod.path.open() as netns:
        agent.verbs.run(request, netns.fileno())


def test_a_pod_without_uid_is_adopted_once(agent: Parts, pod: Running) -> None:
    """A manifest that has never been with an API server has none."""
    agent.pods.pods = [pod.pod(pod.proxy, uid=None)]
    assert agent.reconciler.once()["adopted"] == 1
    assert agent.reconciler.once() == {}
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    enrol_by_cni(agent, pod.wire, agent.pods.pods[0], "mine")
    assert agent.reconciler.once() == {}
    assert agent.enrolments.of_attachment("mine", "eth0") == [pod.wire.sandbox.cookie]


ISTIO = "*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\nCOMMIT\n"


def load(pod: Running, tool: str, rules: str) -> bool:
    argv = [f"{tool}-restore", "--wait=10"]  # the legacy one takes a lock of the machine
    loading = popen(pod.wire.pod.path, None, argv, 0, 0, stdin=subprocess.PIPE, text=True)
    loading.communicate(rules, timeout=10)
    return bool(loading.returncode == 0)


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"])
def test_a_pod_that_istios_rules_capture_is_left_to_them(agent: Parts, pod: Running, tool: str) -> None:
    before = agent.kernel.entries()
    assert load(pod, tool, ISTIO)
    agent.pods.pods = [pod.pod(pod.proxy)]
    assert agent.reconciler.once() == {}
    assert agent.kernel.entries() == before
    ((reason, message),) = agent.events.events
    assert reason == "NotCaptured"
    assert "Istio's own netfilter rules capture it" in message


def test_other_rules_do_not_keep_a_pod_from_adoption(agent: Parts, pod: Running) -> None:
    assert load(pod, "iptables-nft", "*filter\n:MINE - [0:0]\n-A OUTPUT -j MINE\nCOMMIT\n")
    agent.pods.pods = [pod.pod(pod.proxy)]
    assert agent.reconciler.once()["adopted"] == 1


@pytest.mark.parametrize("step", ["link", "rows", "entry", "listeners"])
def test_a_crash_in_the_middle_is_made_good_by_the_next_start(
    kernel: Kernel, pod: Running, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh(pod)
    api_pod = pod.pod(pod.proxy)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with parts(kernel) as first:
                {
                    "link": lambda: monkeypatch.setattr(links, "link_pod", die),
                    "rows": lambda: monkeypatch.setattr(kernel.tables.addresses, "put", die),
                    "entry": lambda: monkeypatch.setattr(kernel.tables.pods, "put", die),
                    "listeners": lambda: monkeypatch.setattr(Hearing, "_store", die),
                }[step]()
                first.adopt(api_pod)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with parts(kernel) as second:
        second.pods.pods = [api_pod]
        assert second.reconciler.once()["adopted"] == 1
        assert listeners(pod.wire) == 2
        assert pod.wire.peer.dial(pod.wire.pod.ip4, 8080)["who"] == "inbound"
        second.enrolments.remove(pod.wire.sandbox.cookie)


def test_nothing_is_left_open(agent: Parts, pod: Running) -> None:
    pod.serve("inbound", "15006x4")
    api_pod = pod.pod(pod.proxy)
    agent.adopt(api_pod)
    before = open_descriptors()
    for _ in range(5):
        agent.enrolments.remove(pod.wire.sandbox.cookie)
        agent.adopt(api_pod)
        agent.reconciler.once()
    assert open_descriptors() == before


def test_lost_listener_entries_are_found_again(agent: Parts, pod: Running) -> None:
    mesh(pod)
    agent.pods.pods = [pod.pod(pod.proxy)]
    agent.reconciler.once()
    for slot in range(LISTENER_SLOTS):
        agent.kernel.tables.listeners.remove(ListenerKey(pod.wire.sandbox.cookie, 15006, slot))
    assert agent.reconciler.once() == {"heard": 2}
    assert pod.wire.peer.dial(pod.wire.pod.ip4, 8080)["who"] == "inbound"


def test_a_listener_that_closes_before_it_is_registered_is_left_out(agent: Parts, pod: Running) -> None:
    enrol_by_cni(agent, pod.wire, pod.pod(pod.proxy))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.shutdown(socket.SHUT_RDWR)  # it listens no more, and its descriptor is still open
        assert agent.enrolments.add_listener(pod.wire.sandbox.cookie, 0, listener) is False
    assert listeners(pod.wire) == 0
