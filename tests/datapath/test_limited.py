"""A container whose memory for sockets is limited: writers wait, as over TCP, and get no error."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf.kernel import cgroup2_root, mounts
from installer.scratch import scratch_cgroup
from tests.lab.machine import acceleration_needed
from tests.lab.node import REPOSITORY

LIMIT = 384 << 10  # bytes; a reader with more room may have 512 KiB past TCP


@contextmanager
def socket_memory(limit: int) -> Iterator[Path]:
    """A cgroup of version 1 with a limit of bytes for TCP, gone afterwards."""
    tops = [each.path for each in mounts("cgroup") if (each.path / "memory.kmem.tcp.limit_in_bytes").exists()]
    assert tops, "the memory controller is not in a hierarchy of version 1, where this test makes its cgroup"
    cgroup = tops[0] / f"sidestep-test-{secrets.token_hex(3)}"
    cgroup.mkdir()
    try:
        (cgroup / "memory.kmem.tcp.limit_in_bytes").write_text(str(limit))
        yield cgroup
    finally:
        for _ in range(50):
            try:
                cgroup.rmdir()
                break
            except OSError:  # the last process is not reaped yet
                time.sleep(0.1)
        assert not cgroup.exists()


def test_a_writer_waits_for_a_reader_whose_container_is_short_of_memory() -> None:
    with acceleration_needed(), scratch_cgroup(cgroup2_root()) as cgroup, socket_memory(LIMIT) as limited:
        there = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(limited)]
        argv = [*there, sys.executable, "-m", "tests.datapath.limited", str(cgroup)]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["off"] == ["", 0]
    error, redirected = found["full"]
    assert error == ""
    assert 0 < redirected < LIMIT * 3 // 4
