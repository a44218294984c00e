"""A process that makes connections, and programs that lack a part, for comparison.

The latter come from a copy of the source tree: the product has no switch for it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.lab.node import REPOSITORY, Node
from tests.lab.pod import Pod

_SOURCE = Path(__file__).with_name("connections.c")


@dataclass(frozen=True)
class Part:
    """A function of the programs that does nothing in the copy."""

    file: str
    function: str
    does_nothing: str  # the statement by which it returns at once


TRACING = Part("events.c", "is_traced", "return false;")
FLOWS = Part("flows.c", "count_from_now", "return;")


@dataclass(frozen=True)
class Made:
    """Calls a second, and the processor's time of one in ns, which others on the machine matter less to."""

    rate: float
    nanoseconds: float


class Connections:
    """Use as a context manager: a pod whose one process makes connections when it is told to (connections.c)."""

    def __init__(self, node: Node) -> None:
        self._node, self._stack = node, ExitStack()

    def __enter__(self) -> "Connections":
        program = self._node.directory / "make-connections"
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, _SOURCE], check=True)
        dns = {"ISTIO_DUAL_STACK": "true", "ISTIO_META_DNS_CAPTURE": "true"}
        pod: Pod = self._node.pod("connections", proxy_env=dns, app=False, envoy=False)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process: subprocess.Popen[str] = self._stack.enter_context(pod.popen([program], **pipes))
        self._stack.callback(self._process.kill)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{_SOURCE.name} does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, call: str, seconds: float) -> Made:
        """As many calls as so many seconds allow."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{call} {seconds}\n")
        self._process.stdin.flush()
        count, spent, busy = map(float, self._process.stdout.readline().split())
        return Made(count / spent, busy / count * 1e9)


class Trees:
    """Use as a context manager: source trees of which one's programs lack a part; gone afterwards."""

    def __init__(self, node: Node, part: Part) -> None:
        self._node, self._part, self._copy = node, part, Path()

    def __enter__(self) -> "Trees":
        self._copy = Path(tempfile.mkdtemp(prefix="sidestep-lacking-"))
        for each in ("bpf", "cni", "installer"):
            shutil.copytree(REPOSITORY / each, self._copy / each, ignore=shutil.ignore_patterns("__pycache__"))
        source, head = self._copy / "bpf" / self._part.file, rf"(^static .* {self._part.function}\(.*\)\n{{\n)"
        text, number = re.subn(head, rf"\1    {self._part.does_nothing}\n", source.read_text(), flags=re.M)
        if number != 1:
            raise RuntimeError(f"{source.name} has no such function: {self._part.function}")
        source.write_text(text)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._copy)

    def attach(self, has_part: bool) -> None:
        """Swap the node's programs for those of one of the trees."""
        argv = [sys.executable, "-m", "installer", "attach"]
        argv += ["--bpffs", str(self._node.bpffs), "--cgroup", str(self._node.kubepods)]
        subprocess.run(argv, cwd=REPOSITORY if has_part else self._copy, check=True, stdout=subprocess.DEVNULL)


def paired(
    node: Node, connections: Connections, part: Part, calls: tuple[str, ...], rounds: int
) -> dict[str, list[float]]:
    """The processor's time of each call with the part, divided by that without: a number for each round.

    Both sides take turns. The node must have no agent, which would attach its own programs.
    """
    times: dict[tuple[str, bool], list[float]] = {}
    with Trees(node, part) as trees:
        for number in range(rounds + 1):
            for has_part in sorted((False, True), reverse=bool(number % 2)):
                trees.attach(has_part)
                for call in calls:
                    nanoseconds = min(connections.make(call, 0.5).nanoseconds for _ in range(3))
                    times.setdefault((call, has_part), []).append(nanoseconds)
    both = {call: list(zip(times[call, True], times[call, False], strict=True))[1:] for call in calls}  # one warms up
    return {call: [with_it / without for with_it, without in rounds_of] for call, rounds_of in both.items()}
