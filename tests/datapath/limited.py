"""A reader in a cgroup with little memory for sockets, which begins late: run as `-m … CGROUP LIMITED`.

Prints by level how many transfers to it were complete, and how many of their bytes were redirected.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bpf.layout import OUTBOUND_PORT, Level
from cni.policy.annotations import CapturePolicy
from installer.acceleration.pairs import PairBench
from installer.scratch import scratch_node
from tests.lab.late import complete_transfers, end_of_transfers, wait_for_listener
from tests.lab.limits import moving_to

_DESTINATION = "198.51.100.1"  # for documentation (RFC 5737): captured, as everything is
_PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def _transfers(bench: PairBench, limited: Path, level: Level) -> tuple[int, int]:
    bench.set_level(level)
    before = bench.traffic().redirected_bytes
    with ExitStack() as stack:
        writer = stack.enter_context(subprocess.Popen(end_of_transfers("write", "", OUTBOUND_PORT), **_PIPES))
        stack.callback(writer.kill)
        wait_for_listener(writer)
        argv = [*moving_to(limited), *end_of_transfers("read", _DESTINATION, 80)]
        reader = stack.enter_context(subprocess.Popen(argv, **_PIPES))
        stack.callback(reader.kill)
        complete = complete_transfers(writer, reader)
    return complete, bench.traffic().redirected_bytes - before


def _main(cgroup: Path, limited: Path) -> dict[str, tuple[int, int]]:
    with scratch_node(cgroup, CapturePolicy(acceleration=Level.FULL)) as scratch:
        bench = PairBench(scratch)
        return {level.name.lower(): _transfers(bench, limited, level) for level in (Level.OFF, Level.FULL)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(*map(Path, sys.argv[1:3]))))
