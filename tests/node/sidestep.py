"""`sidestep …` as an operator types it on a lab's node whose Pods are in a directory."""

import json
import subprocess
from typing import Any

from tests.lab import command as commands
from tests.lab.node import Node

_ABOUT_PODS = ("pods", "explain")


def sidestep(node: Node, command: str, *argv: object, source: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it; no mistake may end in a traceback. `source` is whether it is told where the node's Pods are."""
    agent = ("--cni-agent-run-dir", node.run_dir) if command in _ABOUT_PODS else ()
    told = ("--pods", node.pods_dir) if source and command in _ABOUT_PODS else ()
    done = commands.sidestep(node, command, *agent, *told, *argv, seconds=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def document(node: Node, command: str, *argv: object, status: int = 0, source: bool = True) -> Any:
    """What it says with --output json."""
    done = sidestep(node, command, *argv, "--output", "json", source=source)
    assert done.returncode == status, done.stderr or done.stdout
    return json.loads(done.stdout)
