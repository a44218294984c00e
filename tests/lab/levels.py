"""Levels of acceleration, for tests that hold at each."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

from tests.lab.node import Node

LEVELS = ("off",)


def set_level(node: Node, level: str) -> None:
    """The whole node's, at once, for connections that are there too."""
    assert level in LEVELS


@contextmanager
def changing(node: Node, seconds: float = 0.2) -> Iterator[list[str]]:
    """From level to level meanwhile, `seconds` each; yields the list of those it has set."""
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
        set_level(node, LEVELS[-1])
