"""A reader that reads nothing, with little memory for sockets: run in such a container, as `-m … CGROUP`.

Prints by level what became of its writer: [the error if it is not "try again", bytes that were redirected].
"""

import errno
import json
import socket
import sys
from pathlib import Path

from bpf.layout import Level
from cni.policy.annotations import CapturePolicy
from installer.acceleration.pairs import PairBench
from installer.scratch import scratch_node


def _write(writer: socket.socket) -> str:
    """What the kernel says in the end; "" for EAGAIN, as plain TCP does."""
    writer.setblocking(False)
    try:
        while True:
            writer.send(bytes(16384))
    except OSError as error:
        return "" if error.errno == errno.EAGAIN else errno.errorcode[error.errno or 0]


def _written(bench: PairBench, level: Level) -> tuple[str, int]:
    bench.set_level(level)
    before = bench.traffic().redirected_bytes
    with bench.pair() as pair:
        said = _write(pair.client)
    return said, bench.traffic().redirected_bytes - before


def _main(cgroup: Path) -> dict[str, tuple[str, int]]:
    with scratch_node(cgroup, CapturePolicy(acceleration=Level.FULL)) as scratch:
        bench = PairBench(scratch)
        return {level.name.lower(): _written(bench, level) for level in (Level.OFF, Level.FULL)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(Path(sys.argv[1]))))
