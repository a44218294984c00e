"""The programs behind the server's Envoy: nginx, and iperf3 where bytes are streamed."""

import os
import socket
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.bench.mesh.proxies import SERVICES, Service
from tests.lab.inside import enter_netns
from tests.lab.pod import APP_ID, Pod
from tests.lab.waiting import wait_until

BODIES = {"64k": 64 << 10, "1m": 1 << 20}  # files by name, bytes
_SLOWEST_SECONDS = 60  # a server's start on a machine on which much else is going on

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


def nginx_conf(files: Path, listen: list[str]) -> str:
    """Of a server that has `files` as its own and the world's directory, with these lines that say where it listens."""
    return _NGINX.format(files=files, listen="\n        ".join(listen))


def listening(where: str, service: Service) -> str:
    """The line of a port or unix socket that has to speak what `service` speaks."""
    return f"listen {where} backlog=4096{' http2' if service.speaks == 'http2' else ''};"


class ServerAbsent(Exception):
    """A server does not answer; says whether it has ended, and otherwise what there is in its place."""


@dataclass(frozen=True)
class _Server:
    """One program that was started, and where it writes what it has to say."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def said(self) -> str:
        return f"{self.log.stem} has said:\n{self.log.read_text(errors='replace')[-2000:] or 'nothing'}"

    @property
    def cpu_seconds(self) -> float:
        """What it has used itself (proc(5), stat, fields 14 and 15): next to none, and it has hardly begun."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Servers:
    """What runs in one server pod. `files` is its own directory, open to the pod's users."""

    def __init__(self, pod: Pod, files: Path, unix: bool) -> None:
        self._pod, self.files, self._unix = pod, files, unix

    def start(self) -> None:
        """Run both, until they listen. Raises ServerAbsent."""
        for service in SERVICES.values():
            if self._answers(service.port):
                raise ServerAbsent(f"port {service.port} is taken; {self._listeners()}")
        for name, size in BODIES.items():
            (self.files / name).write_bytes(b"x" * size)
        config = self.files / "nginx.conf"
        config.write_text(nginx_conf(self.files, self._listening()))
        log = self.files / "nginx.log"
        nginx = self._run(["nginx", "-p", self.files, "-c", config, "-e", log], log)
        stream = str(SERVICES["stream"].port)
        iperf3 = self._run(["iperf3", "--server", "--port", stream], self.files / "iperf3.log")
        for service in SERVICES.values():
            self._wait(service.port, iperf3 if service.speaks == "bytes" else nginx)

    def socket(self, service: str) -> Path:
        """Where nginx listens without a network."""
        return self.files / f"{service}.sock"

    def _listening(self) -> list[str]:
        lines = []
        for service in SERVICES.values():
            if service.speaks != "bytes":
                lines.append(listening(str(service.port), service))
                if self._unix:
                    lines.append(listening(f"unix:{self.socket(service.name)}", service))
        return lines

    def _run(self, argv: list[str | Path], log: Path) -> _Server:
        with log.open("ab") as output:
            os.chown(log, APP_ID, APP_ID)  # before it starts: nginx opens its log by name too, and ends if it may not
            return _Server(self._pod.popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output), log)

    def _wait(self, port: int, server: _Server) -> None:
        def answers() -> bool:
            if server.process.poll() is not None:
                raise ServerAbsent(f"port {port}: the server ended with {server.process.returncode}; {server.said}")
            return self._answers(port)

        try:
            wait_until(answers, f"port {port}", _SLOWEST_SECONDS)
        except TimeoutError as error:
            runs = f"the server runs and has used {server.cpu_seconds} s of processor time"
            raise ServerAbsent(f"{error}; {runs}; {server.said}\n{self._listeners()}") from None

    def _listeners(self) -> str:
        argv = ["nsenter", f"--net={self._pod.netns}", "ss", "-Hltnp"]
        return f"in its namespace listen:\n{subprocess.run(argv, capture_output=True, text=True).stdout}"

    def _answers(self, port: int) -> bool:
        made = _socket_in(self._pod.netns)
        with made, suppress(OSError):
            made.settimeout(1)
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
