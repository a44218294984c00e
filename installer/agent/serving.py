"""Serves health or metrics on a port of its own while the agent runs.

Anybody in the cluster may connect. So nobody may keep a thread for long, or keep others from being answered.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from bpf.errors import SidestepError
from installer import VERSION

# seconds for a whole exchange, however slowly it trickles in
_SECONDS = 5.0
# connections at once; kubelet and Prometheus need one each. One more ends the oldest, which is the likeliest to idle
_AT_ONCE = 32


@contextmanager
def serving(port: int, answers: type[BaseHTTPRequestHandler], purpose: str) -> Iterator[int]:
    """Serve on all addresses until the context ends; yields the port. Port 0 means any free port.

    `purpose` names the thread and appears in errors. Raises SidestepError if the port can't be bound.
    """

    class Handler(answers):  # type: ignore[misc, valid-type]
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
    request_queue_size = 512  # with socketserver's 5, a burst has the kernel drop others' SYNs, kubelet's too

    def __init__(self, *arguments: Any) -> None:
        self._since: dict[socket.socket, float] = {}  # open connections, oldest first: when they came
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread. If too many are open, end the oldest."""
        with self._lock:
            oldest = next(iter(self._since)) if len(self._since) >= _AT_ONCE else None
            if oldest:
                del self._since[oldest]
            self._since[request] = time.monotonic()
        if oldest:
            _end(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has been served."""
        with self._lock:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End the connections whose time is over; called twice a second."""
        with self._lock:
            late = [each for each, since in self._since.items() if since < time.monotonic() - _SECONDS]
        for each in late:
            _end(each)

    def server_bind(self) -> None:
        """Bind for IPv4 and IPv6. Unlike HTTPServer.server_bind(), it does not look up the host's name in DNS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: errors here come from clients that hang up."""


def _end(connection: socket.socket) -> None:
    """Wake the thread that reads or writes, and so have it end."""
    with suppress(OSError):  # it has ended just now
        connection.shutdown(socket.SHUT_RDWR)
