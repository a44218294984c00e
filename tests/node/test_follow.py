"""The agent keeps up with what happens in pods' namespaces and Pods' statuses after the ADD."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from bpf.layout import Cookie
from bpf.pins import Pins
from bpf.tables import Tables
from cni.netns.sandbox import MAX_ADDRESSES
from tests.lab.node import Node, make_netns
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until

SOON = 4.0  # seconds: less than the agent's regular look is apart


def ip(netns: Path, *args: object) -> None:
    subprocess.run(["ip", "-n", netns.name, *map(str, args)], check=True)


def is_registered(tables: Tables, address: str) -> bool:
    """Whether a pod has it; each test has one pod that may."""
    return any(key.address.ip() == ip_address(address) for key in tables.addresses.every_key())


@pytest.fixture
def pod(node: Node) -> Pod:
    return node.pod("alpha", workers=1)


@pytest.fixture
def tables(node: Node) -> Iterator[Tables]:
    with Tables(Pins(node.bpffs)) as tables:
        yield tables


@pytest.fixture
def client(node: Node, pod: Pod) -> Iterator[Path]:
    """A namespace with a second cable to the pod, of which the pod's end is not up yet."""
    path = node.netns.with_name(f"sidestep-{node.id}-client")
    make_netns(path)
    with ExitStack() as undo:
        undo.callback(subprocess.run, ["ip", "netns", "del", path.name], check=True)
        ip(path, "link", "add", "eth1", "type", "veth", "peer", "name", "net1", "netns", pod.netns.name)
        ip(path, "addr", "add", "192.0.2.1/24", "dev", "eth1")
        ip(path, "addr", "add", "2001:db8:2::1/64", "dev", "eth1", "nodad")
        ip(path, "link", "set", "eth1", "up")
        yield path


def get(client: Path, address: str) -> str:
    """Who answers an HTTP request from the client's end, by the connection's fate."""
    argv = ["curl", "-s", "-g", "--noproxy", "*", "--max-time", "3", f"http://{address}:8080/"]
    done = subprocess.run(["nsenter", f"--net={client}", *argv], capture_output=True, text=True)
    return "answered" if done.returncode == 0 else f"curl {done.returncode}"


@pytest.mark.parametrize(
    ("address", "url", "prefix"), [("192.0.2.2", "192.0.2.2", 24), ("2001:db8:2::2", "[2001:db8:2::2]", 64)]
)
def test_an_interface_added_to_a_running_pod_is_covered_at_once(
    pod: Pod, client: Path, tables: Tables, address: str, url: str, prefix: int
) -> None:
    ip(pod.netns, "addr", "add", f"{address}/{prefix}", "dev", "net1", *(["nodad"] if ":" in address else []))
    ip(pod.netns, "link", "set", "net1", "up")
    wait_until(lambda: is_registered(tables, address), "the new address to be registered", SOON)
    pod.envoy.connections()
    assert get(client, url) == "answered"
    assert pod.envoy.next_connection().listener == "inbound"

    ip(pod.netns, "addr", "del", f"{address}/{prefix}", "dev", "net1")
    wait_until(lambda: not is_registered(tables, address), "the removed address to be forgotten", SOON)


def test_a_changed_primary_address_is_the_new_source(node: Node, pod: Pod) -> None:
    gamma = node.pod("gamma", mesh=False)
    net = pod.ip4.packed[:3]
    new = ".".join(map(str, (*net, 240)))
    ip(pod.netns, "addr", "add", f"{new}/24", "dev", "eth0")
    ip(pod.netns, "addr", "del", f"{pod.ip4}/24", "dev", "eth0")  # promotes nothing: the other one is first now
    ip(pod.netns, "addr", "replace", f"{new}/24", "dev", "eth0")
    ip(pod.netns, "route", "replace", "default", "via", ".".join(map(str, (*net, 1))))

    def is_seen() -> bool:
        pod.envoy.connections()
        if pod.curl(gamma.ip4).pod != "gamma":
            return False
        return pod.envoy.next_connection().source.startswith(f"{new}:")

    wait_until(is_seen, "the proxy to see the new address", 3)


CONNECT = """
import errno, json, socket, sys
client = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
client.settimeout(5)
try:
    client.connect((sys.argv[1], 8080))
    print(json.dumps("connected"))
except OSError as error:
    print(json.dumps(errno.errorcode.get(error.errno, str(error))))
"""


@pytest.mark.claim("connections there fail for up to a second")
@pytest.mark.parametrize("target", ["203.0.113.9", "2001:db8:9::9"])
def test_routes_that_come_and_go_count(pod: Pod, target: str) -> None:
    version = ip_address(target).version
    network = ip_network(f"{pod.ip4}/24" if version == 4 else f"{pod.ip6}/64", strict=False)

    def is_now(outcome: str) -> None:
        wait_until(lambda: pod.python(CONNECT, target) == outcome, f"{target} to be {outcome}", SOON)

    is_now("connected")
    ip(pod.netns, f"-{version}", "route", "del", "default")
    is_now("ENETUNREACH")
    ip(pod.netns, f"-{version}", "route", "add", "default", "via", network[1])
    is_now("connected")
    ip(pod.netns, f"-{version}", "route", "add", "prohibit", target)
    is_now("EACCES")
    ip(pod.netns, f"-{version}", "rule", "add", "to", target, "lookup", "main")
    is_now("connected")  # routes with a rule of the pod's own are not known
    ip(pod.netns, f"-{version}", "rule", "del", "to", target)
    is_now("EACCES")


def test_an_interface_excluded_by_name_may_come_later(node: Node) -> None:
    pod = node.pod("excluding", annotations={"traffic.sidecar.istio.io/excludeInterfaces": "net1"}, workers=1)
    with Tables(Pins(node.bpffs)) as tables:
        assert not list(tables.interfaces.every_key())
        ip(pod.netns, "link", "add", "net1", "type", "bridge")
        wait_until(lambda: len(list(tables.interfaces.every_key())) == 1, "the interface to be excluded", SOON)
        ip(pod.netns, "addr", "add", "192.0.2.2/24", "dev", "net1")
        ip(pod.netns, "link", "set", "net1", "up")
        wait_until(lambda: len(list(tables.routes.every_key())) > 3, "its routes to be known", SOON)
        ip(pod.netns, "link", "del", "net1")
        wait_until(lambda: not list(tables.interfaces.every_key()), "the interface to be forgotten", SOON)


def test_a_namespace_that_goes_without_del_is_forgotten(node: Node) -> None:
    pod = node.pod("short", envoy=False, app=False)
    assert node.entries()["pods"] == 1
    subprocess.run(["ip", "netns", "del", pod.netns.name], check=True)
    wait_until(lambda: not any(node.entries().values()), "everything of the pod to go", 5)


def test_changes_are_followed_across_a_restart_of_the_agent(node: Node, pod: Pod, tables: Tables) -> None:
    node.agent.terminate()
    ip(pod.netns, "addr", "add", "192.0.2.7/32", "dev", "eth0")
    node.agent.start()
    for address in ("192.0.2.7", "192.0.2.8"):
        wait_until(partial(is_registered, tables, address), f"{address} to be registered", SOON)
        ip(pod.netns, "addr", "replace", "192.0.2.8/32", "dev", "eth0")


def test_a_strict_proxy_is_known_by_its_containers_cgroup(node: Node, tables: Tables) -> None:
    pod = node.pod("strict", annotations={"sidestep.io/strict-proxy": "true"}, envoy=False)
    gamma = node.pod("gamma", mesh=False)
    container = "ab" * 32
    cgroup = pod.cgroup / f"cri-containerd-{container}.scope"
    cgroup.mkdir()
    assert pod.curl(gamma.ip4, uid=1337).pod is None

    path = node.pods_dir / "strict.yaml"
    manifest = yaml.safe_load(path.read_text())
    status = [{"name": "istio-proxy", "containerID": f"containerd://{container}"}]
    path.write_text(yaml.safe_dump({**manifest, "status": {"containerStatuses": status}}))
    wait_until(lambda: bool(list(tables.proxies.every())), "the container to be confirmed", SOON)
    assert [value.quad for _, value in tables.proxies.every()] == [cgroup.stat().st_ino]
    assert isinstance(next(tables.proxies.every_key()), Cookie)


@pytest.mark.claim("delay the agent's work for other pods by changing its addresses all the time")
@pytest.mark.claim("512 of a pod count, and pods take turns")
def test_a_pod_with_thousands_of_addresses_that_never_rests_delays_nobody(
    node: Node, pod: Pod, tables: Tables, tmp_path: Path
) -> None:
    greedy = node.pod("greedy", envoy=False, app=False)
    batch = tmp_path / "addresses"
    every = [f"10.{200 + number // 250 // 250}.{number // 250}.{number % 250 + 1}/32" for number in range(4000)]
    batch.write_text("".join(f"addr add {each} dev eth0\n" for each in every))
    ip(greedy.netns, "-batch", batch)
    endless = "while true; do ip addr add 192.0.2.9/32 dev eth0; ip addr del 192.0.2.9/32 dev eth0; sleep 0.05; done"
    with subprocess.Popen(["nsenter", f"--net={greedy.netns}", "sh", "-c", endless]) as restless:
        try:
            wait_until(lambda: is_registered(tables, "10.200.0.1"), "the first of them to be registered", SOON)
            for number in range(5):
                ip(pod.netns, "addr", "add", f"192.0.2.{100 + number}/32", "dev", "eth0")
                wait_until(partial(is_registered, tables, f"192.0.2.{100 + number}"), "its turn", 2)
            assert tables.addresses.count() < MAX_ADDRESSES + 50
        finally:
            restless.kill()
