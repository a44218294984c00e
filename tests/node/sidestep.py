"""`sidestep …` as an operator of a lab's node types it."""

import json
import subprocess
import sys
from typing import Any

from tests.lab.node import REPOSITORY, Node


def sidestep(node: Node, command: str, *argv: object, source: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it; no mistake may end in a traceback. `source` is whether the node's Pods can be read."""
    options: list[object] = ["--bpffs", node.bpffs, "--cgroup", node.kubepods]
    if source:
        options += ["--pods", node.pods_dir]
    done = subprocess.run(
        [sys.executable, "-m", "installer", command, *map(str, options), *map(str, argv)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def document(node: Node, command: str, *argv: object, status: int = 0, source: bool = True) -> Any:
    """What it says with --output json."""
    done = sidestep(node, command, *argv, "--output", "json", source=source)
    assert done.returncode == status, done.stderr or done.stdout
    return json.loads(done.stdout)
