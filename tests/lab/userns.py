"""A network namespace as a pod with `hostUsers: false` has it: owned by a user namespace of its own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FIRST = 200000  # what id 0 of the namespace is outside


@contextmanager
def mapped_netns() -> Iterator[Path]:
    """Ids 0–65535 of it are 200000–265535 outside; it is gone afterwards."""
    argv = ["unshare", "--user", "--net", "--kill-child", "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(f"0 {FIRST} 65536")
        yield Path(f"/proc/{holder.pid}/ns/net")
        holder.kill()
