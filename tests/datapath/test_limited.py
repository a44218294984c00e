"""A container whose memory for sockets is limited, in cgroup version 1: transfers to it are complete, as over TCP."""

import json
import subprocess
import sys

from bpf.kernel import cgroup2_root
from installer.scratch import scratch_cgroup
from tests.lab.late import CONNECTIONS, SIZE
from tests.lab.limits import SOCKET_MEMORY, limited_cgroup
from tests.lab.machine import acceleration_needed
from tests.lab.node import REPOSITORY

LIMIT = 8 << 20  # bytes; less than the transfers have, and than their readers may have past TCP without a limit


def test_a_reader_that_begins_late_with_little_memory_gets_everything() -> None:
    with (
        acceleration_needed(),
        scratch_cgroup(cgroup2_root()) as cgroup,
        limited_cgroup(SOCKET_MEMORY, LIMIT) as limited,
    ):
        argv = [sys.executable, "-m", "tests.datapath.limited", str(cgroup), str(limited)]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["off"] == [CONNECTIONS, 0]
    complete, redirected = found["full"]
    assert complete == CONNECTIONS
    assert 0 < redirected < CONNECTIONS * SIZE
