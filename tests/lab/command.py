"""The command line, as an operator runs it on a lab's node."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from tests.lab import invocation
from tests.lab.node import REPOSITORY, Node

_TRACE_SECONDS = 120.0


def sidestep(node: Node, *argv: object, seconds: float = 60) -> "subprocess.CompletedProcess[str]":
    """`sidestep …` with this node's pins."""
    command, *rest = argv
    return invocation.sidestep(command, "--bpffs", node.bpffs, *rest, seconds=seconds)


def sidestep_json(node: Node, *argv: object) -> Any:
    """What it prints with --output json. Raises CalledProcessError with its words."""
    done = sidestep(node, *argv, "--output", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def tracing(node: Node, *argv: object, output: Any = subprocess.PIPE) -> Iterator["subprocess.Popen[str]"]:
    """`sidestep trace … --follow` that is under way when it is yielded; killed at the end, if it still runs."""
    options = map(str, ("--bpffs", node.bpffs, *argv, "--follow"))
    command = [sys.executable, "-m", "installer", "trace", *options]
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
