"""The moments between: pods made while something restarts, a node that boots, a plugin that comes late or leaves.

Where the plugin is in the chain throughout, a mesh pod is captured from its first connection on, or refused. What the
layout of cgroups changes, test_life.py tries with both.
"""

import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.e2e.cluster import OWNED, PRIMARY, Cluster
from tests.lab.cri import CriPod, Refused
from tests.lab.waiting import wait_until

pytestmark = pytest.mark.parametrize("cluster", ["pure"], indirect=True, scope="module")


def pods_during(cluster: Cluster, first: CriPod, prefix: str, happening: Callable[[], None]) -> None:
    """Make one pod after the other while something happens; each is captured at once, or refused."""
    thread = threading.Thread(target=happening)
    thread.start()
    try:
        for number in count():
            pod = cluster.pod_or_nothing(f"{prefix}{number}")
            if pod:
                assert cluster.is_captured(first, pod)
                assert cluster.is_captured(pod, first)
                pod.remove()
            if not thread.is_alive():
                break
    finally:
        thread.join()
    assert cluster.is_captured(first, cluster.pod(f"{prefix}-after"))


def test_a_mesh_pod_without_its_proxy_reaches_nobody_and_is_reached_by_nobody(cluster: Cluster, first: CriPod) -> None:
    plain, pod = cluster.pod("plain", mesh=False), CriPod(cluster.runtime, "early")
    pod.create_sandbox()
    pod.start_app()
    for one, other in ((pod, plain), (plain, pod)):
        assert [one.get(ip, seconds=1) for ip in other.ips] == ["", ""]
    pod.start_envoy()
    assert cluster.is_captured(first, pod)
    assert cluster.is_captured(pod, first)


def test_pods_made_while_the_agent_restarts_are_captured_or_refused(cluster: Cluster, first: CriPod) -> None:
    def restart() -> None:
        for end in (cluster.node.agent.kill, cluster.node.agent.terminate, cluster.node.agent.kill):
            end()
            cluster.node.agent.start()

    pods_during(cluster, first, "restart", restart)


def test_pods_made_during_an_upgrade_and_back_are_captured_or_refused(
    cluster: Cluster, first: CriPod, tmp_path: Path
) -> None:
    other = cluster.another_version(tmp_path)

    def upgrade() -> None:
        cluster.node.agent.terminate()
        cluster.node.agent.start(other)
        cluster.node.agent.terminate()
        cluster.node.agent.start()

    pods_during(cluster, first, "upgrade", upgrade)


def test_a_connection_outlasts_crashes_an_upgrade_and_the_runtime(
    cluster: Cluster, first: CriPod, tmp_path: Path
) -> None:
    second = cluster.pod("second")
    with second.downloading(first) as got:
        cluster.node.agent.kill()
        cluster.node.agent.start(cluster.another_version(tmp_path))
        cluster.node.agent.terminate()
        cluster.runtime.kill()
        cluster.runtime.start()
        cluster.node.agent.start()
        assert got.read_text() == "begin\n"
    assert got.read_text() == "begin\nend\n"


def test_a_crash_of_the_runtime_in_the_middle_of_pods_lets_none_through(cluster: Cluster, first: CriPod) -> None:
    made: list[CriPod] = []

    def make() -> None:
        for number in range(6):
            pod = CriPod(cluster.runtime, f"crash{number}")
            try:
                pod.create_sandbox()
            except Refused:
                continue
            made.append(pod)

    making = threading.Thread(target=make)
    making.start()
    wait_until(lambda: bool(made), "the first sandbox")
    cluster.runtime.kill()
    making.join()
    cluster.runtime.start()
    for pod in made:
        pod.start_app()
        pod.start_envoy()
        assert cluster.is_captured(first, pod)
        pod.remove()
    assert cluster.is_captured(first, cluster.pod("after-crash"))


def test_the_plugin_goes_where_a_new_primary_configuration_is(cluster: Cluster, first: CriPod) -> None:
    path = cluster.runtime.write_conf("05-other.conflist")
    cluster.wait_until_installed(path.name)
    assert cluster.is_captured(first, cluster.pod("other-conf"))
    path.unlink()
    cluster.wait_until_installed()
    assert cluster.is_captured(first, cluster.pod("back-again"))


def test_what_starts_without_the_plugin_is_enrolled_as_soon_as_the_agent_knows_that_it_runs(
    cluster: Cluster, first: CriPod
) -> None:
    agent = cluster.node.agent
    agent.terminate()
    agent.options.remove("--install")
    agent.start()
    cluster.runtime.write_conf()
    try:
        for number in range(3):
            pod = cluster.pod(f"uncaptured{number}")
            print(f"{pod.name} was open for {cluster.seconds_until_enrolled(pod):.3f} s")
            cluster.captured_soon(first, pod)
    finally:
        agent.terminate()
        agent.options.append("--install")
        agent.start()
    cluster.wait_until_installed()


def test_with_a_list_of_our_own_no_moment_is_open_however_often_the_primary_one_is_overwritten(
    cluster: Cluster, first: CriPod
) -> None:
    agent, primary = cluster.node.agent, cluster.runtime.net / PRIMARY
    during: list[list[str]] = []

    def restart(*options: str) -> None:
        agent.terminate()
        agent.options[before:] = options
        agent.start()

    def overwrite() -> None:
        restart("--istio-owned-cni-config")
        cluster.wait_until_installed(OWNED)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            cluster.runtime.write_conf()  # by a rename
            time.sleep(0.05)
            primary.write_text(primary.read_text())  # or in place: for a moment it is empty
            time.sleep(0.05)
            primary.unlink()
            time.sleep(0.05)
        during.append(cluster.plugins(OWNED))
        cluster.runtime.write_conf()
        during.append(cluster.plugins())
        restart()  # and back: the primary one gets the entry before ours goes
        cluster.wait_until_installed()

    before = len(agent.options)
    pods_during(cluster, first, "owned", overwrite)
    assert during == [["bridge", "portmap", "sidestep-cni"], ["bridge", "portmap"]]
    assert not (cluster.runtime.net / OWNED).exists()


def test_what_starts_without_the_plugin_is_captured_once_it_is_installed(cluster: Cluster, first: CriPod) -> None:
    cluster.node.agent.kill()
    chain, plugin, programs, *_ = cluster.uninstall("--end-capture")
    assert chain == f"plugin removed from {cluster.runtime.net / '10-lab.conflist'}"
    assert (plugin.rpartition(" ")[2], programs.rpartition(" ")[2]) == ("removed", "removed")
    before = cluster.pod("before")
    assert cluster.proxies_between(before, first) == set()
    cluster.node.agent.start()
    cluster.wait_until_installed()
    cluster.captured_soon(before, first)
    assert cluster.is_captured(cluster.pods["second"], first)


def test_after_a_reboot_mesh_pods_wait_for_the_agent(cluster: Cluster, first: CriPod) -> None:
    cluster.lose_power()
    cluster.runtime.start()
    for pod in cluster.pods.values():  # kubelet takes down what was
        pod.remove()
    cluster.pods.clear()
    # of the pods that the runtime was making when it crashed only the primary plugin knows
    orphans = set(cluster.addresses())
    assert orphans.isdisjoint(first.ips)
    with pytest.raises(Refused, match=r"cannot reach .*cni.sock"):
        cluster.pod("too-early")
    plain = cluster.pod("plain-early", mesh=False)
    cluster.node.agent.start()
    one, other = cluster.pod("one"), cluster.pod("other")
    assert cluster.is_captured(one, other)
    assert plain.get(one.ip) == "one"
    assert cluster.node.entries()["pods"] == 2
    assert set(cluster.addresses()) - orphans == {ip for pod in cluster.pods.values() for ip in pod.ips}
