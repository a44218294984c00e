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
    """Serve on all addresses meanwhile; yields the port, for 0 any free one. Raises SidestepError when it is taken."""

    class Handler(answers):  # type: ignore[misc, valid-type]
        timeout = 5  # seconds for a request, so that a client that says nothing keeps no thread

        def version_string(self) -> str:
            """The header Server, as `sidestep status` asks who answers."""
            return f"sidestep/{VERSION}"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: kubelet asks every few seconds."""

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
        """For both families, and without asking DNS for the host's name, as HTTPServer does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""
