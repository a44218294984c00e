"""Labels that flip again and again cost an agent neither descriptors nor memory. `make ambient-flips` has many more.

Flips go the whole way: an API server's watch, the members, a real ztunnel socket with real namespaces, annotations.
"""

import ctypes
import gc
import os
import random
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import structlog

from tests.lab.ambient import AMBIENT, AmbientNode
from tests.lab.cluster import World
from tests.lab.netns_fds import namespaces
from tests.lab.waiting import wait_until
from tests.lab.zds_client import Ztunnel, wait_ready

PODS, FLIPS = int(os.environ.get("PODS", "40")), int(os.environ.get("FLIPS", "2000"))
ROUND = 200  # flips between two looks whether all has come to rest
MOST_KIB = 16 << 10  # of growth after the first tenth: allocators keep some of what they had at the busiest moment


def test_flipping_labels_leave_no_descriptors_no_memory_and_the_right_members(world: World, tmp_path: Path) -> None:
    node, chance = AmbientNode(world, tmp_path / "ztunnel.sock"), random.Random(1)
    with _many_descriptors(), _quiet(), namespaces(PODS) as made, ExitStack() as up:
        wished = {f"pod-{number}": False for number in range(PODS)}
        for name, where in zip(wished, made, strict=True):
            node.sandboxes[node.pod(name).uid or ""] = where
        up.enter_context(node.agent())
        told = up.enter_context(Ztunnel(node.socket, (15008,)).running())
        wait_ready(told)
        for labels in (AMBIENT, None):  # connections to the API server are kept
            node.pod("pod-0", labels)
            node.wait_redirection("pod-0", "enabled" if labels else None)
        descriptors, memory = _descriptors(), 0
        for done in range(0, FLIPS, ROUND):
            for _ in range(ROUND):
                name = chance.choice(list(wished))
                wished[name] = not wished[name]
                node.pod(name, AMBIENT if wished[name] else None)
            _wait_settled(node, told, wished)
            _forget_history(node)
            if done <= FLIPS // 10:
                memory = _memory()
        assert _memory() - memory < MOST_KIB
        for name in wished:
            node.pod(name)
        _wait_settled(node, told, dict.fromkeys(wished, False))
        assert _descriptors() == descriptors
        assert not node.table.rows and not told.proxies
        assert not node.members._attempts.known()


def _wait_settled(node: AmbientNode, told: Ztunnel, wished: dict[str, bool]) -> None:
    names = {node.world.server.pods["default", name]["metadata"]["uid"]: name for name in wished}
    inside = {uid for uid, name in names.items() if wished[name]}

    def is_settled() -> bool:
        return (
            told.proxies.keys() == inside
            and set(node.table.enrolled().values()) == inside
            and all((node.redirection(name) == "enabled") == wished[name] for name in wished)
        )

    wait_until(is_settled, f"{len(inside)} pods to be in the mesh", 60)
    assert all(told.proxies[uid].namespace == node.sandboxes[uid].identity for uid in inside)


def _forget_history(node: AmbientNode) -> None:
    """What the API double remembers for those who watch anew, and for tests: that is its own memory."""
    server = node.world.server
    with server._lock:
        server._history.clear()
        server.written.clear()
        server.events.clear()
    node.world.requests.clear()


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _memory() -> int:
    """KiB that are resident, without what the allocator could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 10


@contextmanager
def _many_descriptors() -> Iterator[None]:
    """Four for each pod: its namespace here and at ztunnel, the listener, and one that is on its way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * PODS + 1000)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without log lines, which pytest would keep."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)
