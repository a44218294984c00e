"""Namespaces with nothing in them: all there is to a pod where no traffic flows."""

import gc
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cni.netns.sandbox import own_cookie, visit
from tests.datapath.wires import ip_command
from tests.lab.inside import PYTHON, popen


@dataclass(frozen=True)
class Pod:
    """A namespace of its own, and what it is watched by."""

    name: str
    cookie: int

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def ip(self, command: str) -> None:
        ip_command("-n", self.name, *command.split())

    def python(self, code: str, number: int) -> None:
        assert popen(self.path, None, [*PYTHON, code, str(number)], 0, 0).wait(20) == 0


MakePods = Callable[[int], list[Pod]]


@contextmanager
def bare_pods() -> Iterator[MakePods]:
    """Makes namespaces with loopback up; they are removed again, those that a test has removed excepted."""
    names: list[str] = []

    def make(count: int) -> list[Pod]:
        tag = secrets.token_hex(3)
        fresh = [f"sidestep-{tag}-{number}" for number in range(count)]
        names.extend(fresh)
        ip_batch([f"netns add {name}" for name in fresh])
        for name in fresh:
            ip_command("-n", name, "link", "set", "lo", "up")
        return [Pod(name, _cookie(name)) for name in fresh]

    try:
        yield make
    finally:
        ip_batch([f"netns del {name}" for name in names if (Path("/run/netns") / name).exists()])


def ip_batch(commands: list[str]) -> None:
    """Many commands of iproute2's ip in one process."""
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def _cookie(name: str) -> int:
    with (Path("/run/netns") / name).open() as netns:
        return visit(netns.fileno(), lambda _: own_cookie())


def open_descriptors() -> int:
    """How many this process has, without those that earlier tests have dropped and nobody has closed yet."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
