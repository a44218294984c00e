"""Pods that ran before sidestep did, and what somebody else takes away, with real Envoys and the agent's API watch."""

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bpf.pins import Pins
from tests.lab.apiserver import ApiServer
from tests.lab.curl import REFUSED
from tests.lab.envoy import PROXY_ID
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with ApiServer().running() as api, Node(api=api) as made:
        made.agent.options += ["--reconcile-seconds", "1"]
        made.agent.terminate()
        made.agent.start()
        yield made


@pytest.fixture(scope="module")
def client(node: Node) -> Pod:
    """In the mesh from the beginning."""
    return node.pod("client")


def running_before(node: Node, name: str, **options: Any) -> Pod:
    """A pod that is made, proxy and all, while the agent is away and its plugin in no chain."""
    node.agent.terminate()
    node.is_chained = False
    try:
        return node.pod(name, **options)
    finally:
        node.is_chained = True


def is_captured(client: Pod, server: Pod) -> None:
    """Both ways and both families through the proxies."""
    for one, other in ((client, server), (server, client)):
        for ip in other.ips:
            for pod in (client, server):
                pod.envoy.connections()
            reply = one.curl(ip)
            assert reply.pod == other.name
            outbound, inbound = one.envoy.next_connection(), other.envoy.next_connection()
            assert outbound.listener == "outbound"
            assert inbound.listener == "inbound"


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pod_that_ran_before_the_agent_is_captured_from_then_on(node: Node, client: Pod, workers: int) -> None:
    pod = running_before(node, f"early{workers}", workers=workers)
    node.agent.start()
    wait_until(lambda: node.entries()["pods"] == 2, "the pod to be adopted", 10)
    assert node.entries()["listeners"] == 2 * (2 + min(workers, 2))  # two a family at most
    is_captured(client, pod)
    assert node.api is not None
    reasons = {event["reason"] for event in node.api.events if event["involvedObject"]["name"] == pod.name}
    assert reasons == {"CaptureFound"}  # it was never broken, so nothing was repaired
    pod.stop()
    wait_until(lambda: node.entries()["pods"] == 1, "the pod to be forgotten", 10)


def test_a_transparent_proxy_that_ran_before_the_agent_shows_the_app_its_clients(node: Node, client: Pod) -> None:
    annotations = {"sidecar.istio.io/interceptionMode": "TPROXY"}
    pod = running_before(node, "transparent", annotations=annotations)
    node.agent.start()
    wait_until(lambda: node.entries()["pods"] == 2, "the pod to be adopted", 10)
    is_captured(client, pod)
    for ip, own in zip(pod.ips, client.ips, strict=True):
        reply = client.curl(ip, uid=PROXY_ID)  # past its own proxy, which would be the client else
        assert reply.body["peer"] == str(own)
    pod.stop()


def test_a_proxy_that_starts_while_its_pod_is_adopted_gets_inbound_connections(node: Node, client: Pod) -> None:
    """Envoy binds its listeners and listens on them later, so the pod may be enrolled in between."""
    pods = [running_before(node, f"starting{number}", envoy=False) for number in range(3)]
    node.agent.start()
    for pod in pods:
        pod.envoy.start()
    wait_until(lambda: node.entries()["pods"] == 4, "the pods to be adopted", 10)
    wait_until(lambda: node.entries()["listeners"] == 16, "the proxies to be heard", 10)
    for pod in pods:
        is_captured(client, pod)
        pod.stop()


def test_del_forgets_an_adopted_pod_before_its_namespace_is_gone(node: Node, client: Pod) -> None:
    pod = running_before(node, "deleted", app=False)
    node.agent.start()
    wait_until(lambda: node.entries()["pods"] == 2, "the pod to be adopted", 10)
    pod.envoy.stop()
    node.chain.delete(pod.attachment, pod.result)
    assert node.entries()["pods"] == 1
    assert node.entries()["links"] == 1
    pod.stop()


def test_a_pod_outside_of_the_mesh_is_left_alone(node: Node, client: Pod) -> None:
    pod = running_before(node, "plain", mesh=False)
    node.agent.start()
    reply = pod.curl(client.ip4)
    assert reply.pod == "client"
    assert node.entries()["pods"] == 1
    pod.stop()


def test_a_pod_whose_annotations_are_refused_is_told_once(node: Node, client: Pod) -> None:
    pod = running_before(node, "wrong", annotations={"traffic.sidecar.istio.io/excludeOutboundPorts": "80-90"})
    node.agent.start()
    assert node.api is not None
    events = node.api.events
    wait_until(lambda: any(event["involvedObject"]["name"] == "wrong" for event in events), "the Event", 10)
    told = [event for event in events if event["involvedObject"]["name"] == "wrong"]
    assert [(event["type"], event["reason"]) for event in told] == [("Warning", "CaptureRefused")]
    assert '"80-90" is not a port' in told[0]["message"]
    pod.stop()


def test_a_pod_that_appears_uncaptured_while_the_agent_runs_is_adopted(node: Node, client: Pod) -> None:
    node.is_chained = False
    pod = node.pod("bypassed")
    node.is_chained = True
    wait_until(lambda: node.entries()["pods"] == 2, "the pod to be adopted", 10)
    is_captured(client, pod)
    pod.stop()


def detach_links(pins: Pins) -> None:
    for path in pins.links.iterdir():
        path.unlink()


def delete_tree(directory: Path) -> None:
    """Everything below it, and itself unless the agent has put something back in the meantime."""

    def refused(_: object, __: str, raised: tuple[type[BaseException], BaseException, object]) -> None:
        if not (isinstance(raised[1], OSError) and raised[1].errno == errno.ENOTEMPTY):
            raise raised[1]

    shutil.rmtree(directory, onerror=refused)


def delete_programs(pins: Pins) -> None:
    delete_tree(pins.programs)


def delete_maps(pins: Pins) -> None:
    delete_tree(pins.maps)


def delete_steering(pins: Pins) -> None:
    for path in pins.netns.iterdir():
        path.unlink()


def delete_everything(pins: Pins) -> None:
    delete_tree(pins.top)


@pytest.mark.parametrize("tamper", [delete_maps, delete_programs, delete_everything])
def test_what_somebody_takes_while_no_agent_runs_is_made_again_at_its_start(
    node: Node, client: Pod, tamper: Callable[[Pins], None]
) -> None:
    server = node.pod(f"orphan-{tamper.__name__.replace('_', '-')}")
    node.agent.kill()
    tamper(Pins(node.bpffs))
    node.agent.start()
    wait_until(lambda: node.entries()["listeners"] > 0, "the pod to be adopted if it was forgotten", 15)
    is_captured(client, server)
    server.stop()


@pytest.mark.claim("Without an agent, the files are the only handle on the programs")
def test_without_an_agent_capture_ends_with_the_pins() -> None:
    with Node() as node:
        client, server = node.pod("client", mesh=False), node.pod("server")
        node.agent.kill()
        server.envoy.stop()
        assert client.curl(server.ip4).exit_code == REFUSED
        delete_everything(Pins(node.bpffs))
        wait_until(lambda: client.curl(server.ip4).pod == "server", "the application to be reached past its proxy")


@pytest.mark.parametrize("tamper", [detach_links, delete_programs, delete_maps, delete_steering, delete_everything])
def test_what_somebody_takes_from_the_bpffs_is_put_back(
    node: Node, client: Pod, tamper: Callable[[Pins], None]
) -> None:
    server = node.pod(tamper.__name__.replace("_", "-"))
    pins = Pins(node.bpffs)
    before = node.policies()
    tamper(pins)

    wait_until(lambda: node.is_whole(before), "everything to be put back", 15)
    wait_until(lambda: (pins.programs / "sk_lookup").exists() and len(list(pins.links.iterdir())) == 13, "links", 15)
    is_captured(client, server)
    server.stop()
