"""`python -m tests.kernels.limited_application CGROUP`: a receiving application in a container with little memory.

One line of JSON a try. At level proxy its connections are as at off, so only full is tried beside off.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from bpf.layout import OUTBOUND_PORT, Level
from cni.policy.annotations import CapturePolicy
from installer.acceleration.pairs import PairBench
from installer.scratch import scratch_node
from tests.kernels.limits import MIB, PIPES, Fate, kill_after, oom_kills
from tests.lab.late import complete_transfers, end_of_transfers, wait_for_listener
from tests.lab.limits import moving_to

# memory.max; idle, the application has 5 MiB, and plain TCP fills 8 MiB in all
LIMITS, TRIES = (10, 12, 16, 24, 32), 3
_DESTINATION = "198.51.100.1"  # for documentation (RFC 5737): captured, as everything is


def main(cgroup: Path) -> None:
    """The scratch node's only pod has two cgroups: one for this process and the proxy, one for the application."""
    with scratch_node(cgroup, CapturePolicy(acceleration=Level.FULL)) as scratch:
        own, limited = cgroup / "own", cgroup / "limited"
        for each in (own, limited):
            each.mkdir()
        (own / "cgroup.procs").write_text("0")
        (cgroup / "cgroup.subtree_control").write_text("+memory")
        bench = PairBench(scratch)
        for mib in LIMITS:
            (limited / "memory.max").write_text(str(mib * MIB))
            for level in (Level.OFF, Level.FULL):
                bench.set_level(level)
                for _ in range(TRIES):
                    found = Fate("application", mib, str(level), *_try(limited))
                    print(json.dumps(found.document()), flush=True)


def _try(limited: Path) -> tuple[int, int]:
    kills = oom_kills(limited)
    with ExitStack() as stack:
        writer = subprocess.Popen(end_of_transfers("write", "", OUTBOUND_PORT), **PIPES)
        kill_after(writer, stack)
        wait_for_listener(writer)
        reader = subprocess.Popen([*moving_to(limited), *end_of_transfers("read", _DESTINATION, 80)], **PIPES)
        kill_after(reader, stack)
        return complete_transfers(writer, reader), oom_kills(limited) - kills


if __name__ == "__main__":
    main(Path(sys.argv[1]))
