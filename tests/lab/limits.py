"""Cgroups of version 1 with a limit of the memory controller, and how a command gets into one."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf.kernel import mounts
from tests.lab.cgroups import remove_cgroup

MEMORY, SOCKET_MEMORY = "memory.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes"


@contextmanager
def limited_cgroup(setting: str, limit: int) -> Iterator[Path]:
    """A cgroup with a limit in bytes, by MEMORY of all or by SOCKET_MEMORY of TCP's; gone afterwards."""
    tops = [each.path for each in mounts("cgroup") if (each.path / setting).exists()]
    assert tops, "the memory controller is not in a hierarchy of version 1, where this test makes its cgroup"
    cgroup = tops[0] / f"sidestep-test-{secrets.token_hex(3)}"
    cgroup.mkdir()
    try:
        (cgroup / setting).write_text(str(limit))
        yield cgroup
    finally:
        remove_cgroup(cgroup)


def moving_to(cgroup: Path) -> list[str]:
    """What a command begins with so that it runs there."""
    return ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(cgroup)]
