"""The programs behind the server's Envoy: nginx, and iperf3 where bytes are streamed."""

import os
import socket
import subprocess
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.bench.mesh.proxies import SERVICES
from tests.lab.inside import enter_netns
from tests.lab.pod import APP_ID, Pod
from tests.lab.waiting import wait_until

BODIES = {"64k": 64 << 10, "1m": 1 << 20}  # files by name, bytes

_NGINX = """
worker_processes 1;
pid {files}/nginx.pid;
daemon off;
events {{ worker_connections 20000; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    client_header_timeout 3600s;
    client_body_temp_path {files}/body; proxy_temp_path {files}/proxy; fastcgi_temp_path {files}/fastcgi;
    uwsgi_temp_path {files}/uwsgi; scgi_temp_path {files}/scgi;
    server {{
        {listen}
        root {files};
        location = / {{ return 200 "ok\\n"; }}
    }}
}}
"""


class Servers:
    """What runs in one server pod. `files` is its own directory, open to the pod's users."""

    def __init__(self, pod: Pod, files: Path, unix: bool) -> None:
        self._pod, self.files, self._unix = pod, files, unix

    def start(self) -> None:
        """Run both, until they listen."""
        for name, size in BODIES.items():
            (self.files / name).write_bytes(b"x" * size)
        config = self.files / "nginx.conf"
        config.write_text(_NGINX.format(files=self.files, listen="\n        ".join(self._listening())))
        log = self.files / "nginx.log"
        self._run(["nginx", "-p", self.files, "-c", config, "-e", log], log)
        stream = SERVICES["stream"].port
        self._run(["iperf3", "--server", "--port", str(stream)], self.files / "iperf3.log")
        for service in SERVICES.values():
            wait_until(partial(self._answers, service.port), f"port {service.port}; see {log}", 60)

    def socket(self, service: str) -> Path:
        """Where nginx listens without a network."""
        return self.files / f"{service}.sock"

    def _listening(self) -> list[str]:
        lines = []
        for service in SERVICES.values():
            if service.speaks != "bytes":
                suffix = " http2;" if service.speaks == "http2" else ";"
                lines.append(f"listen {service.port} backlog=4096{suffix}")
                if self._unix:
                    lines.append(f"listen unix:{self.socket(service.name)} backlog=4096{suffix}")
        return lines

    def _run(self, argv: list[str | Path], log: Path) -> None:
        with log.open("ab") as output:
            self._pod.popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        os.chown(log, APP_ID, APP_ID)

    def _answers(self, port: int) -> bool:
        made = _socket_in(self._pod.netns)
        with made, suppress(OSError):
            made.connect(("127.0.0.1", port))
            return True
        return False


def _socket_in(netns: Path) -> socket.socket:
    """A TCP socket of another network namespace; it stays there."""
    found: list[socket.socket] = []

    def enter() -> None:
        with netns.open() as opened:
            enter_netns(opened.fileno())
        found.append(socket.socket())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return found[0]
