"""Pods of CRI-O: the plugin called with its arguments, in its cgroups (tests/lab/crio.py has what its sources say)."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.lab import curl
from tests.lab.chain import CniFailed
from tests.lab.crio import CrioNode, CrioPod
from tests.lab.pod import APP_PORT, Pod
from tests.node.test_elsewhere import choosing

DRIVERS = ("cgroupfs", "systemd")


@pytest.fixture
def node() -> Iterator[CrioNode]:
    made = CrioNode()
    choosing(made)
    with made:
        yield made


def pod_of(node: CrioNode, name: str, driver: str, mesh: bool = True) -> CrioPod:
    pod = CrioPod(node, name, driver, mesh)
    pod.create()
    return pod


def reaches(client: Pod, server: Pod, listener: str, of: Pod) -> None:
    """The server's application answers at both addresses, past this listener of a proxy."""
    for ip in server.ips:
        of.envoy.connections()
        assert client.curl(ip).pod == server.name
        assert of.envoy.next_connection().listener == listener


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_pod_is_captured_both_ways(node: CrioNode, driver: str) -> None:
    gamma, alpha = pod_of(node, "gamma", driver, mesh=False), pod_of(node, "alpha", driver)
    reaches(alpha, gamma, "outbound", alpha)
    reaches(gamma, alpha, "inbound", alpha)


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_crio_keeps_in_the_pods_cgroup_beside_it_is_not_captured(node: CrioNode, driver: str) -> None:
    gamma, alpha = pod_of(node, "gamma", driver, mesh=False), pod_of(node, "alpha", driver)
    reaches(alpha, gamma, "outbound", alpha)
    alpha.envoy.connections()
    for ip in gamma.ips:
        reply = curl.curl(node.netns, alpha.conmon, f"http://{curl.host(ip)}:{APP_PORT}/", 0, 0)
        assert reply.pod == "gamma"
    reaches(alpha, gamma, "outbound", alpha)
    assert alpha.envoy.connections() == []


def test_a_pod_that_lost_its_network_is_deleted_by_what_is_remembered(node: CrioNode) -> None:
    alpha = pod_of(node, "alpha", "systemd")
    alpha.envoy.stop()
    subprocess.run(["ip", "netns", "del", alpha.netns.name], check=True)
    node.chain.delete(alpha.attachment, alpha.result)
    assert node.entries()["pods"] == 0
    node.chain.delete(alpha.attachment, alpha.result)


def test_without_the_agent_pods_outside_the_mesh_start_and_others_wait(node: CrioNode) -> None:
    node.agent.kill()
    pod_of(node, "gamma", "systemd", mesh=False)
    with pytest.raises(CniFailed) as refused:
        pod_of(node, "alpha", "systemd")
    assert refused.value.plugin == "sidestep-cni"
    assert refused.value.code == 11
