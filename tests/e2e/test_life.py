"""A node's life with a real containerd: whatever happens, a mesh pod is captured or refused, never silently open.

All pods are made through CRI and all requests come from inside their containers. The tests of a module follow one
another on one node, as the things they are about do.
"""

import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.cluster import DAEMONSET, Cluster
from tests.lab.cri import CriPod, Refused
from tests.lab.waiting import wait_until


def test_mesh_pods_are_captured_and_plain_ones_are_not(cluster: Cluster, first: CriPod) -> None:
    second, plain = cluster.pod("second"), cluster.pod("plain", mesh=False)
    assert cluster.is_captured(second, first)
    ip4, ip6 = second.ips
    assert cluster.is_captured(first, second, ip4)
    assert cluster.is_captured(first, second, ip6)
    plain.envoy.connections()
    first.envoy.connections()
    assert plain.get(first.ip) == "first"
    assert first.envoy.next_connection().listener == "inbound"
    assert first.get(plain.ip) == "plain"
    assert first.envoy.next_connection().listener == "outbound"


def test_without_the_agent_mesh_pods_are_refused_and_plain_ones_start(cluster: Cluster, first: CriPod) -> None:
    cluster.node.agent.kill()
    with pytest.raises(Refused, match=r"cannot reach .*cni.sock"):
        cluster.pod("refused")
    plain = cluster.pod("plain-without-agent", mesh=False)
    assert plain.get(first.ip) == "first"
    assert cluster.is_captured(cluster.pods["second"], first)
    cluster.node.agent.start()
    assert cluster.is_captured(first, cluster.pod("after-restart"))


def test_stopping_the_agent_changes_nothing(cluster: Cluster, first: CriPod) -> None:
    cluster.node.agent.terminate()
    assert cluster.is_installed()
    assert cluster.is_captured(cluster.pods["second"], first)
    with pytest.raises(Refused):
        cluster.pod("refused-too")
    cluster.node.agent.start()


def test_a_configuration_that_somebody_overwrites_is_repaired(cluster: Cluster, first: CriPod) -> None:
    cluster.runtime.write_conf()
    pod = cluster.pod("in-between")  # the runtime may have read either
    wait_until(cluster.is_installed, "the repair", 3)
    cluster.captured_soon(first, pod)
    assert cluster.is_captured(first, cluster.pod("after-repair"))
    cluster.have_repaired(cluster.runtime.write_conf)


def test_pods_made_while_the_configuration_keeps_changing_are_captured(cluster: Cluster, first: CriPod) -> None:
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.wait(0.7):
            cluster.runtime.write_conf()

    rewriting = threading.Thread(target=rewrite)
    rewriting.start()
    made = []
    try:
        for number in range(4):
            with suppress(Refused):
                made.append(cluster.pod(f"fight{number}"))
    finally:
        stop.set()
        rewriting.join()
    for pod in made:
        cluster.captured_soon(first, pod)
    wait_until(cluster.is_installed, "the last repair", 5)


def test_a_plugin_that_somebody_deletes_comes_back(cluster: Cluster, first: CriPod) -> None:
    (cluster.runtime.bin / "sidestep-cni").unlink()
    before = set(cluster.addresses())
    try:
        cluster.captured_soon(first, cluster.pod("while-deleted"))
    except Refused:  # and the runtime could not take the sandbox down either: a chain's DEL begins with the last plugin
        cluster.orphans = set(cluster.addresses()) - before
    wait_until(cluster.is_installed, "the plugin", 3)
    assert cluster.is_captured(first, cluster.pod("after-deletion"))
    cluster.have_repaired((cluster.runtime.bin / "sidestep-cni").unlink)


def test_a_restart_of_the_runtime_loses_nothing(cluster: Cluster, first: CriPod) -> None:
    cluster.runtime.stop()
    cluster.runtime.start()
    assert cluster.is_captured(cluster.pods["second"], first)
    assert cluster.is_captured(first, cluster.pod("after-runtime"))


def test_an_upgrade_keeps_pods_and_captures_new_ones(cluster: Cluster, first: CriPod, tmp_path: Path) -> None:
    cluster.node.agent.terminate()
    cluster.node.agent.start(cluster.another_version(tmp_path))
    wait_until(lambda: "programs=swapped" in cluster.node.agent.log.read_text(), "the new programs", 5)
    assert cluster.is_captured(cluster.pods["second"], first)
    assert cluster.is_captured(first, cluster.pod("after-upgrade"))


def test_pods_that_end_leave_nothing(cluster: Cluster, first: CriPod) -> None:
    for name, pod in list(cluster.pods.items()):
        if name not in ("first", "second"):
            pod.remove()
            del cluster.pods[name]
    wait_until(lambda: cluster.node.entries()["pods"] == 2, "two pods to be left", 10)
    assert cluster.node.entries()["links"] == 2
    assert set(cluster.addresses()) - cluster.orphans == {ip for pod in cluster.pods.values() for ip in pod.ips}


def test_an_outage_of_the_api_server_lets_nobody_through(cluster: Cluster, first: CriPod) -> None:
    cluster.api.stop()
    try:
        pod = CriPod(cluster.runtime, "unheard-of")
        with pytest.raises(Refused, match=r"\) not found: |cannot be reached"):
            pod.create()
        plain = CriPod(cluster.runtime, "plain-unheard-of", mesh=False)
        plain.create()
        assert plain.get(first.ip) == "first"
    finally:
        cluster.api.start()
    wait_until(lambda: cluster.api.watchers == 1, "the watch again", 40)
    assert cluster.is_captured(first, cluster.pod("after-outage"))


def test_with_its_daemonset_goes_the_plugin_and_a_person_ends_capture(cluster: Cluster, first: CriPod) -> None:
    second = cluster.pods["second"]
    with second.downloading(first):
        del cluster.api.daemonsets[DAEMONSET]
        cluster.node.agent.terminate()
        assert cluster.plugins() == ["bridge", "portmap"]
        assert not (cluster.runtime.bin / "sidestep-cni").exists()
        assert cluster.is_captured(first, second)
        after = cluster.pod("after-deletion-of-all")
        assert cluster.proxies_between(after, first) == {"first inbound"}
        assert cluster.uninstall("--end-capture")[0].startswith("programs detached, pins in ")
    assert not (cluster.node.bpffs / "sidestep").exists()
    assert cluster.proxies_between(first, second) == set()
    assert cluster.uninstall() == ["nothing was installed"]
