"""The command line, as an operator runs it on a lab's node."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from tests.lab.node import REPOSITORY, Node

_TRACE_SECONDS = 120.0


def sidestep(node: Node, *argv: object, seconds: float = 30) -> "subprocess.CompletedProcess[str]":
    """`sidestep …` with this node's pins."""
    return subprocess.run(_argv(node, argv), cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)


def sidestep_json(node: Node, *argv: object) -> Any:
    """What it prints with --output json. Raises CalledProcessError with its words."""
    done = sidestep(node, *argv, "--output", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def tracing(node: Node, *argv: object, output: Any = subprocess.PIPE) -> Iterator["subprocess.Popen[str]"]:
    """`sidestep trace … --follow` that is under way when it is yielded; killed at the end, if it still runs."""
    command = _argv(node, ("trace", *argv, "--follow"))
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.PIPE, text=True) as process:
        # or a test that waits for an event that does not come would wait for ever
        limit = Timer(_TRACE_SECONDS, process.kill)
        limit.start()
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "tracing\n"
            yield process
        finally:
            limit.cancel()
            process.kill()


def _argv(node: Node, argv: tuple[object, ...]) -> list[str]:
    command, *rest = map(str, argv)
    return [sys.executable, "-m", "installer", command, "--bpffs", str(node.bpffs), *rest]
