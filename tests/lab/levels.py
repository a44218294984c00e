"""Levels of acceleration, for tests that hold at each."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from bpf.acceleration import NodeLevel, level_of
from bpf.acceleration import set_level as set_node_level
from bpf.layout import LEVELS, Cookie
from bpf.pins import Descriptor, Pins
from bpf.tables import Tables
from cni.sandbox import own_cookie, visit
from tests.lab.node import REPOSITORY, Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until


def set_level(node: Node, level: str) -> None:
    """The whole node's, at once, for connections that are there too; agent and self-test aren't asked.

    The agent sets its own when it starts and keeps what it finds from then on.
    """
    with Tables(Pins(node.bpffs)) as tables:
        set_node_level(tables, NodeLevel(LEVELS[level], LEVELS[level], "a test"))


def start_agent(node: Node, level: str, source: Path = REPOSITORY) -> None:
    """Start an agent that is to bring the node to a level, and wait until it has."""
    node.agent.options = ["--acceleration", level]
    node.agent.start(source)
    with Tables(Pins(node.bpffs)) as tables:
        wait_until(lambda: level_of(tables).level == LEVELS[level], f"level {level}; see {node.agent.log}", 20)


def redirected_bytes(pod: Pod) -> int:
    """How much of what was sent in the pod has skipped TCP's path so far."""
    with Descriptor(os.open(pod.netns, os.O_RDONLY)) as netns:
        cookie = visit(netns.fd, lambda _: own_cookie())
    with Tables(Pins(pod.node.bpffs)) as tables:
        sums = tables.traffic.get(Cookie(cookie))
    assert sums is not None
    return int(sums.redirected_bytes)


@contextmanager
def changing(node: Node, seconds: float = 0.2) -> Iterator[list[str]]:
    """From level to level meanwhile, `seconds` each; yields the list of those it has set. Afterwards it is off."""
    done, seen = threading.Event(), list[str]()

    def change() -> None:
        for level in cycle(LEVELS):
            set_level(node, level)
            seen.append(level)
            if done.wait(seconds):
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        set_level(node, "off")
