"""Inbound connections of real Envoys: many workers and both families on one listener, a successor, strict pods."""

import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.lab.envoy import Envoy
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


@pytest.fixture(scope="module")
def client(node: Node) -> Pod:
    return node.pod("client", mesh=False)


def is_captured(client: Pod, pod: Pod, envoy: Envoy) -> bool:
    """Whether connections of both families get to the application through this proxy, rather than being refused."""
    envoy.connections()
    for ip in pod.ips:
        if client.curl(ip).pod is None:
            return False
        assert envoy.next_connection().listener == "inbound"
    return True


@pytest.mark.parametrize("workers", [16, 17])
def test_an_envoy_with_many_workers_and_its_successor_serve_both_families(
    node: Node, client: Pod, workers: int
) -> None:
    pod = node.pod(f"many{workers}", envoy=False)
    old, new = (Envoy(pod.directory / name, pod.netns, pod.cgroup, workers) for name in ("old", "new"))
    try:
        old.start()
        assert is_captured(client, pod, old)
        new.start()
        old.stop()
        assert is_captured(client, pod, new)
    finally:
        old.stop()
        new.stop()
        pod.stop()


def test_a_strict_envoy_that_listens_before_its_container_is_known_gets_its_connections(
    node: Node, client: Pod
) -> None:
    """And so it is after each restart of the container, which the kubelet tells after the fact."""
    pod = node.pod("strict", envoy=False, annotations={"sidestep.io/strict-proxy": "true"})
    for _ in range(2):
        container = secrets.token_hex(32)
        cgroup = pod.cgroup / f"cri-containerd-{container}.scope"
        cgroup.mkdir()
        envoy = Envoy(pod.directory / container, pod.netns, cgroup)
        try:
            envoy.start()
            assert client.curl(pod.ip4).pod is None
            tell_container(node.pods_dir / "strict.yaml", pod, container)
            wait_until(partial(is_captured, client, pod, envoy), "the proxy to be heard", 3)
        finally:
            envoy.stop()
            cgroup.rmdir()
    pod.stop()


def tell_container(path: Path, pod: Pod, container: str) -> None:
    statuses = [{"name": "istio-proxy", "containerID": f"containerd://{container}"}]
    path.write_text(yaml.safe_dump(pod.manifest() | {"status": {"containerStatuses": statuses}}))
