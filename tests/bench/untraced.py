"""A process that makes connections, and programs that never ask whether they are traced, for comparison.

The latter come from a copy of the source tree: the product has no switch for it.
"""

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
_QUESTION = "static __always_inline bool is_traced(__u64 cookie)\n{\n"


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
    """Use as a context manager: source trees of which one's programs do not ask; gone afterwards."""

    def __init__(self, node: Node) -> None:
        self._node, self._copy = node, Path()

    def __enter__(self) -> "Trees":
        self._copy = Path(tempfile.mkdtemp(prefix="sidestep-untraced-"))
        for each in ("bpf", "cni", "installer"):
            shutil.copytree(REPOSITORY / each, self._copy / each, ignore=shutil.ignore_patterns("__pycache__"))
        events = self._copy / "bpf" / "events.c"
        text = events.read_text()
        if _QUESTION not in text:
            raise RuntimeError(f"{events.name} does not ask as this bench thinks")
        events.write_text(text.replace(_QUESTION, f"{_QUESTION}    return false;\n"))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._copy)

    def attach(self, asks: bool) -> None:
        """Swap the node's programs for those of one of the trees."""
        argv = [sys.executable, "-m", "installer", "attach"]
        argv += ["--bpffs", str(self._node.bpffs), "--cgroup", str(self._node.kubepods)]
        subprocess.run(argv, cwd=REPOSITORY if asks else self._copy, check=True, stdout=subprocess.DEVNULL)
