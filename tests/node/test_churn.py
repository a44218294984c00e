"""Sockets of pods that come and go leave nothing in the maps."""

import time
from dataclasses import replace

from bpf.layout import LEVELS
from tests.lab.levels import redirected_bytes, set_level
from tests.lab.traffic.program import Load, calling, serving
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh, accelerated_mesh

# As many as 10,000 a minute of each pair for some seconds, however long they take where others need the processor
CHURN = Load(seconds=120, connections=1000, parallel=16, mean=2_000, pause=0, seed=7)
ROUNDS = 2  # of pods, at each level
PER_CONNECTION = ("handshakes", "dials", "accelerated", "meetings")


def entries(mesh: Mesh) -> dict[str, int]:
    """What is in the maps, less the arrivals.

    One whose client is established at another level, or never, stays until the map needs its room.
    """
    return {name: count for name, count in mesh.node.policies().items() if name != "arrivals"}


def churn(mesh: Mesh, load: Load) -> None:
    with serving(mesh.beta) as server, calling(mesh.alpha, mesh.beta.ip4, load) as client:
        asked, answered = client.finish(load.seconds), server.finish()
    assert asked.finished == answered.finished == load.connections
    print(f"{load.connections} connections: {60 * load.connections / asked.seconds:.0f} a minute")


def test_connections_of_pods_that_come_and_go_leave_nothing() -> None:
    with accelerated_mesh() as mesh:
        mesh.node.pods["gamma"].stop()
        with_pods = entries(mesh)
        redirected = 0
        for level in LEVELS:
            set_level(mesh.node, level)
            for number in range(ROUNDS):
                before = redirected_bytes(mesh.alpha)
                churn(mesh, replace(CHURN, seed=number))
                redirected += redirected_bytes(mesh.alpha) - before
                assert (redirected > 0) == (level != "off")
                mesh = renewed(mesh, f"{level}-{number}")
                wait_until(lambda: _left(mesh) == {}, f"connections at level {level} to leave {PER_CONNECTION}", 60)  # noqa: B023
        assert entries(mesh) == with_pods
        mesh.alpha.stop()
        mesh.beta.stop()
        wait_until(lambda: set(entries(mesh).values()) == {0}, f"pods to leave all of {with_pods}", 60)


def renewed(mesh: Mesh, suffix: str) -> Mesh:
    """Two other pods, the ones before gone with connections under way."""
    with serving(mesh.beta), calling(mesh.alpha, mesh.beta.ip4, Load(seconds=60, pause=10_000)) as client:
        time.sleep(0.3)
        client.process.kill()
        mesh.alpha.stop()
    mesh.beta.stop()
    allowed = {"sidestep.io/acceleration": "full"}
    alpha, beta = (mesh.node.pod(f"{name}-{suffix}", annotations=allowed) for name in ("alpha", "beta"))
    return replace(mesh, alpha=alpha, beta=beta)


def _left(mesh: Mesh) -> dict[str, int]:
    return {name: count for name, count in entries(mesh).items() if count and name in PER_CONNECTION}


def test_pods_that_are_killed_in_the_middle_leave_nothing() -> None:
    with accelerated_mesh() as mesh:
        set_level(mesh.node, "full")
        with serving(mesh.beta), calling(mesh.alpha, mesh.beta.ip4, Load(seconds=30)) as client:
            wait_until(lambda: redirected_bytes(mesh.alpha) > 1_000_000, "data to be redirected")
            client.process.kill()
            mesh.alpha.stop()
        mesh.beta.stop()
        mesh.node.pods["gamma"].stop()
        wait_until(lambda: set(entries(mesh).values()) == {0}, "nothing to be left of the pods")
