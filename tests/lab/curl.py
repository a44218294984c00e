"""Real curl inside a pod or on the node, and what it saw."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.inside import popen

REFUSED = 7  # curl's exit code for "failed to connect"
_MARK = "\n--written-out--"


@dataclass(frozen=True)
class Reply:
    """One request's outcome. `peer` is what getpeername() told curl, as "ip:port" or "[ip]:port"."""

    exit_code: int
    status: int
    body: Any
    peer: str
    local: str
    error: str

    @property
    def pod(self) -> str | None:
        """Whose application answered."""
        return self.body.get("pod") if isinstance(self.body, dict) else None


def host(ip: object) -> str:
    """An address as URLs write it."""
    return f"[{ip}]" if ":" in str(ip) else str(ip)


def curl(netns: Path, cgroup: Path | None, url: str, uid: int, gid: int, *options: str) -> Reply:
    """GET `url` once, without proxies from the environment, within five seconds."""
    argv = ["curl", "-sS", "-g", "--noproxy", "*", "--max-time", "5", "-w", f"{_MARK}%{{json}}", *options, url]
    process = popen(netns, cgroup, argv, uid, gid, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate(timeout=10)
    text, _, written = out.partition(_MARK)
    seen = json.loads(written)
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    return Reply(
        process.returncode,
        seen["http_code"],
        body,
        f"{host(seen['remote_ip'])}:{seen['remote_port']}",
        seen["local_ip"],
        error.strip(),
    )
