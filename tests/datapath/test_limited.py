"""A container whose memory for sockets is limited: writers wait, as over TCP, and get no error."""

import json
import subprocess
import sys

from bpf.kernel import cgroup2_root
from installer.scratch import scratch_cgroup
from tests.lab.limits import SOCKET_MEMORY, limited_cgroup, moving_to
from tests.lab.machine import acceleration_needed
from tests.lab.node import REPOSITORY

LIMIT = 384 << 10  # bytes; a reader with more room may have 512 KiB past TCP


def test_a_writer_waits_for_a_reader_whose_container_is_short_of_memory() -> None:
    with (
        acceleration_needed(),
        scratch_cgroup(cgroup2_root()) as cgroup,
        limited_cgroup(SOCKET_MEMORY, LIMIT) as limited,
    ):
        argv = [*moving_to(limited), sys.executable, "-m", "tests.datapath.limited", str(cgroup)]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["off"] == ["", 0]
    error, redirected = found["full"]
    assert error == ""
    assert 0 < redirected < LIMIT * 3 // 4
