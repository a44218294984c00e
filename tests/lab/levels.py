"""Levels of acceleration, for tests that hold at each."""

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from bpf.acceleration import NodeLevel, level_of
from bpf.acceleration import set_level as set_node_level
from bpf.layout import LEVELS, Cookie
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.netns.sandbox import own_cookie, visit
from installer.acceleration.selftest import memory_shortage
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
    """Start an agent that is to bring the node to a level, and wait until it says that it has."""
    logged = node.agent.log.stat().st_size if node.agent.log.exists() else 0
    node.agent.options = ["--acceleration", level]
    node.agent.start(source)
    wait_for_level(node, level, logged)


def wait_for_level(node: Node, level: str, logged: int = 0) -> None:
    """Until the agent has settled it, which it says after the first `logged` bytes of its log.

    A machine that is busy may need several self-tests. Raises TimeoutError with what counts instead, and why.
    """

    def is_settled() -> bool:
        said = re.findall(rb"acceleration\.settled .*?\bat=(\w+)", node.agent.log.read_bytes()[logged:])
        return bool(said) and said[-1] == level.encode()

    try:
        wait_until(is_settled, f"level {level}", 90)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {state(node)}; see {node.agent.log}") from None


def state(node: Node) -> str:
    """The level that counts, and why."""
    with Tables(Pins(node.bpffs)) as tables:
        found = level_of(tables)
    return f"level {found.level} of {found.wanted} ({found.reason}); {memory_shortage() or 'TCP has memory'}"


def redirected_bytes(pod: Pod) -> int:
    """How much of what was sent in the pod has skipped TCP's path so far."""
    with Descriptor(os.open(pod.netns, os.O_RDONLY)) as netns:
        cookie = visit(netns.fd, lambda _: own_cookie())
    with Tables(Pins(pod.node.bpffs)) as tables:
        sums = tables.traffic.get(Cookie(cookie))
    assert sums is not None
    return int(sums.redirected_bytes)


@contextmanager
def changing(node: Node, seconds: float = 0.2, levels: Iterable[str] = LEVELS) -> Iterator[list[str]]:
    """From level to level meanwhile, `seconds` each; yields the list of those it has set. Afterwards it is off."""
    done, seen = threading.Event(), list[str]()

    def change() -> None:
        for level in cycle(levels):
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
