"""Serves health or metrics on a port of its own while the agent runs."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from bpf.errors import SidestepError
from installer import VERSION


@contextmanager
def serving(port: int, answers: type[BaseHTTPRequestHandler], purpose: str) -> Iterator[int]:
    """Serve on all addresses until the context ends; yields the port. Port 0 means any free port.

    `purpose` names the thread and appears in errors. Raises SidestepError if the port can't be bound.
    """

    class Handler(answers):  # type: ignore[misc, valid-type]
        timeout = 5  # seconds for a request, so that a silent client does not hold a thread

        def version_string(self) -> str:
            """Value of the header Server, by which `sidestep status` recognizes the agent."""
            return f"sidestep/{VERSION}"

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: kubelet asks every few seconds."""

    try:
        server = _Server(("", port), Handler)
    except OSError as error:
        raise SidestepError(f"port {port} for {purpose}: {error.strerror}; choose another") from error
    thread = threading.Thread(target=server.serve_forever, name=purpose)
    thread.start()
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        """Bind for IPv4 and IPv6. Unlike HTTPServer.server_bind(), it does not look up the host's name in DNS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: errors here come from clients that hang up."""
