"""Sockets of pods that come and go leave nothing in the maps."""

from bpf.layout import LEVELS
from tests.lab.levels import redirected_bytes, set_level
from tests.lab.traffic.program import Load, calling, serving
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh, accelerated_mesh

# at least 10,000 a minute: each in beta's and alpha's proxy and both applications
CHURN = Load(seconds=12, connections=2000, parallel=32, mean=2_000, pause=0, seed=7)
PER_CONNECTION = ("handshakes", "dials", "accelerated", "meetings")


def churn(mesh: Mesh, load: Load) -> None:
    with serving(mesh.beta) as server, calling(mesh.alpha, mesh.beta.ip4, load) as client:
        asked, answered = client.finish(), server.finish()
    assert asked.finished == answered.finished == load.connections


def test_connections_that_come_and_go_leave_nothing() -> None:
    with accelerated_mesh() as mesh:
        mesh.node.pods["gamma"].stop()
        with_pods = mesh.node.entries()
        for level in LEVELS:
            set_level(mesh.node, level)
            churn(mesh, CHURN)
            wait_until(lambda: _left(mesh) == {}, f"connections at level {level} to leave {PER_CONNECTION}")
        assert redirected_bytes(mesh.alpha) > 0
        assert mesh.node.entries() == with_pods
        mesh.alpha.stop()
        mesh.beta.stop()
        wait_until(lambda: set(mesh.node.entries().values()) == {0}, f"pods to leave all of {with_pods}")


def _left(mesh: Mesh) -> dict[str, int]:
    return {name: count for name, count in mesh.node.entries().items() if count and name in PER_CONNECTION}


def test_pods_that_are_killed_in_the_middle_leave_nothing() -> None:
    with accelerated_mesh() as mesh:
        set_level(mesh.node, "full")
        with serving(mesh.beta), calling(mesh.alpha, mesh.beta.ip4, Load(seconds=30)) as client:
            wait_until(lambda: redirected_bytes(mesh.alpha) > 1_000_000, "data to be redirected")
            client.process.kill()
            mesh.alpha.stop()
        mesh.beta.stop()
        mesh.node.pods["gamma"].stop()
        wait_until(lambda: set(mesh.node.entries().values()) == {0}, "nothing to be left of the pods")
