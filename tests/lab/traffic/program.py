"""The traffic generator in pods: a server in one, clients in others, and what they have seen."""

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.lab.istiod.sent import SERVER_FIRST
from tests.lab.pod import Pod

PORT = SERVER_FIRST  # each side may be the first to send
_BUILD = Path(__file__).parents[3] / "build"


@dataclass(frozen=True)
class Summary:
    """What one end has done: connections, bytes, and how often a blocking call came back with EAGAIN."""

    finished: int
    unfinished: int
    sent: int
    received: int
    again: int
    seconds: float


@dataclass(frozen=True)
class Load:
    """What a client is to do until a limit is reached; main.c says what each means."""

    seconds: int = 5
    total: int = 1 << 40
    connections: int = 0
    parallel: int = 32
    mean: int = 2_000_000
    pause: int = 200
    seed: int = 1

    def arguments(self) -> list[str]:
        """In the order of the command line."""
        values = (self.seconds, self.total, self.connections, self.parallel, self.mean, self.pause, self.seed)
        return [str(value) for value in values]


class Running:
    """A client or server that runs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def stop(self) -> None:
        """Have a client make no more connections; those that are there come to their end."""
        self.process.terminate()

    def complaint(self) -> str:
        """What it has said at its end."""
        return self.process.communicate(timeout=10)[1]

    def finish(self, seconds: float = 60) -> Summary:
        """Wait for its end. Raises AssertionError with what it has to say if it isn't content."""
        try:
            out, error = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == 0, error
        return Summary(**json.loads(out.splitlines()[-1]))


@cache
def program() -> Path:
    """The binary; workers of one run take turns to look whether it is up to date."""
    _BUILD.mkdir(exist_ok=True)
    with (_BUILD / ".traffic.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-C", Path(__file__).parent], check=True)
    return _BUILD / "traffic"


@contextmanager
def serving(pod: Pod, port: int = PORT) -> Iterator[Running]:
    """A server in the pod; killed afterwards if nobody has waited for its end."""
    running = _start(pod, ["server", str(port)])
    try:
        assert running.process.stdout is not None
        assert running.process.stdout.readline() == "ready\n"
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@contextmanager
def calling(pod: Pod, ip: object, load: Load, port: int = PORT) -> Iterator[Running]:
    """A client in the pod; killed afterwards if nobody has waited for its end."""
    running = _start(pod, ["client", str(ip), str(port), *load.arguments()])
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def _start(pod: Pod, arguments: list[str]) -> Running:
    # by descriptor: the checkout may be where the pod's user cannot go
    binary = os.open(program(), os.O_RDONLY)
    pipe = subprocess.PIPE
    try:
        argv = [f"/proc/self/fd/{binary}", *arguments]
        return Running(pod.popen(argv, pass_fds=[binary], stdin=pipe, stdout=pipe, stderr=pipe, text=True))
    finally:
        os.close(binary)
