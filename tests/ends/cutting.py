"""Cuts transfers: kills one of the four processes that carry them, and tells how the others' connections ended."""

import json
import os
import random
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.lab.inside import PYTHON
from tests.lab.levels import set_level
from tests.lab.node import Node
from tests.lab.pod import APP_TCP_PORT, Pod
from tests.lab.waiting import wait_until

CONNECTIONS = 4  # of one transfer, all cut by one kill
_STREAMS = Path(__file__).with_name("streams.py").read_text()
_FLOWING = 1 << 18  # bytes of each connection that have come before anything is done (streams.py)
_UNLIMITED = 1 << 62
_LONGEST_SECONDS = 0.05  # from when all connections flow until the kill, at most
_LEAST, _MOST = 20_000, 400_000  # bytes that the victim has unread: less than BACKLOG_BUDGET of message.c
_SETTLING_SECONDS = 0.02  # for what is written to reach the victim's sockets
_END_SECONDS = 30


class Victim(StrEnum):
    """Who is killed, by SIGKILL."""

    WRITER = "the writing application"
    WRITERS_PROXY = "the writer's proxy"
    READERS_PROXY = "the reader's proxy"
    READER = "the reading application"


class Moment(StrEnum):
    """When."""

    FLOWING = "in full flow"
    UNREAD = "with some bytes unread"  # and nothing else under way


# nobody writes to the writing application, so it has nothing unread
CASES = ((Victim.WRITER, Moment.FLOWING), *((each, moment) for each in list(Victim)[1:] for moment in Moment))


@dataclass
class Ends:
    """How often the surviving applications' connections ended how.

    An orderly end is "all" if the reader has got as much as the kernel had taken from the writer, else "end".
    """

    writer: Counter[str] = field(default_factory=Counter)
    reader: Counter[str] = field(default_factory=Counter)


class Transfers:
    """From one pod of a node to another, through both proxies, as Istio carries plain TCP to a pod's address."""

    def __init__(self, node: Node, source: Pod, target: Pod, seed: int) -> None:
        self._node, self._source, self._target = node, source, target
        self._numbers = random.Random(seed)

    def cut(self, victim: Victim, moment: Moment, level: str, kills: int) -> Ends:
        """Cut so many transfers one after another, each CONNECTIONS at once."""
        set_level(self._node, level)
        ends = Ends()
        for _ in range(kills):
            self._cut_one(victim, moment, ends)
        return ends

    def _cut_one(self, victim: Victim, moment: Moment, ends: Ends) -> None:
        taken = os.memfd_create("taken")
        _limit(taken, _UNLIMITED if moment is Moment.FLOWING else _FLOWING)
        try:
            with self._running(taken) as (writer, reader):
                process = self._process(victim, writer, reader)
                if moment is Moment.FLOWING:
                    time.sleep(self._numbers.uniform(0, _LONGEST_SECONDS))
                else:
                    _stop(process)
                    self._write_more(taken)
                process.kill()
                process.wait()
                if victim is not Victim.WRITER:
                    ends.writer.update(end for end, _ in _said(writer))
                if victim is not Victim.READER:
                    got = _said(reader)
                    ends.reader.update(_named(*each) for each in zip(got, _taken(taken), strict=True))
        finally:
            os.close(taken)
        for each in (self._source, self._target):
            if each.envoy.process and each.envoy.process.poll() is not None:
                each.envoy.start()

    def _write_more(self, taken: int) -> None:
        limit = _FLOWING + self._numbers.randint(_LEAST, _MOST)
        _limit(taken, limit)
        wait_until(lambda: min(_taken(taken)) == limit, "the writer to write", _END_SECONDS)
        time.sleep(_SETTLING_SECONDS)

    @contextmanager
    def _running(self, taken: int) -> Iterator[tuple[Any, Any]]:
        started = []
        try:
            reader = self._target.popen(
                [*PYTHON, _STREAMS, "read", str(APP_TCP_PORT), str(CONNECTIONS)], stdout=subprocess.PIPE, text=True
            )
            started.append(reader)
            assert reader.stdout.readline() == "ready\n"
            argv = [*PYTHON, _STREAMS, "write", self._target.ip4, APP_TCP_PORT, CONNECTIONS, taken]
            writer = self._source.popen(list(map(str, argv)), pass_fds=[taken], stdout=subprocess.PIPE, text=True)
            started.append(writer)
            assert reader.stdout.readline() == "flowing\n"
            yield writer, reader
        finally:
            for each in started:
                each.kill()
                each.communicate()

    def _process(self, victim: Victim, writer: Any, reader: Any) -> Any:
        return {
            Victim.WRITER: writer,
            Victim.WRITERS_PROXY: self._source.envoy.process,
            Victim.READERS_PROXY: self._target.envoy.process,
            Victim.READER: reader,
        }[victim]


@contextmanager
def transfers(seed: int) -> Iterator[Transfers]:
    """On a node of their own, between pods that allow every level."""
    node = Node()
    node.agent.options = ["--acceleration", "off"]
    with node:
        allowed = {"sidestep.io/acceleration": "full"}
        source, target = (Pod(node, name, annotations=allowed, app=False) for name in ("alpha", "beta"))
        for each in (source, target):
            node.pods[each.name] = each
            each.create()
        yield Transfers(node, source, target, seed)


def _stop(process: Any) -> None:
    """Have it stand still, with all its threads."""
    process.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{process.pid}/task")
    wait_until(lambda: all(_state(each) == "T" for each in threads.iterdir()), "all threads to stop")


def _state(thread: Path) -> str:
    """Of a thread, as proc(5) names it."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


def _taken(file: int) -> tuple[int, ...]:
    """How many bytes the kernel has taken from the writer of each connection."""
    return struct.unpack(f"{CONNECTIONS}Q", os.pread(file, 8 * CONNECTIONS, 0))


def _limit(file: int, size: int) -> None:
    os.pwrite(file, struct.pack("Q", size), 8 * CONNECTIONS)


def _named(found: tuple[str, int], written: int) -> str:
    end, read = found
    return "all" if end == "end" and read >= written else end


def _said(process: Any) -> list[tuple[str, int]]:
    said, _ = process.communicate(timeout=_END_SECONDS)
    return [(end, size) for end, size in json.loads(said)]
