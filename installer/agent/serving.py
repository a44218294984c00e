"""Serves a WSGI application on a port of its own while the agent runs."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from bpf.errors import SidestepError
from installer import VERSION

Application = Callable[..., Any]
# how long the loop sleeps between looks for its end; each look wakes the processor
_POLL_SECONDS = 0.5


@contextmanager
def serving(port: int, application: Application, purpose: str) -> Iterator[int]:
    """Serve on all addresses meanwhile; yields the port, for 0 any free one. Raises SidestepError when it is taken."""
    server = _listen(port, purpose)
    server.set_app(_signed(application))
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name=purpose)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _signed(application: Application) -> Application:
    """Say in every answer who gives it, and in which version: `sidestep status` asks."""

    def signed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [*headers, ("Server", f"sidestep/{VERSION}")], *error)

        return application(environ, start)

    return signed


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without asking DNS for the host's name, as the base class does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "sidestep", self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = 5  # seconds for a request, so that a client that says nothing keeps no thread

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: kubelet asks every few seconds."""


def _listen(port: int, purpose: str) -> WSGIServer:
    try:
        return _Server6(("::", port), _Quiet)
    except OSError:  # no IPv6 on this node, or the port is taken: then the same again
        pass
    try:
        return _Server(("0.0.0.0", port), _Quiet)
    except OSError as error:
        raise SidestepError(f"port {port} for {purpose}: {error.strerror}; choose another") from error
