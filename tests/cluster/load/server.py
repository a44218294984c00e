"""Runs in a pod, with the standard library alone: answers HTTP, lines, and before a client has said anything.

Each answer names the server and where the connection came from, as the application sees it: 127.0.0.6 is its proxy.
`server.py PORT` answers HTTP alone, on another port than the usual one.
"""

import json
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTTP, LINES, FIRST = 8080, 9000, 9001


class Seen(BaseHTTPRequestHandler):
    """Tells what a request looked like here."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment, or the client waits for the second one's acknowledgement

    def do_GET(self) -> None:
        told = {"server": socket.gethostname(), "caller": caller_of(self), "headers": dict(self.headers)}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Line(socketserver.StreamRequestHandler):
    """Answers each line with its name, the caller, and the line."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(f"{socket.gethostname()} {caller_of(self)} ".encode() + line)


class First(Line):
    """Speaks first, as the servers of many databases do."""

    def handle(self) -> None:
        self.wfile.write(f"{socket.gethostname()} {caller_of(self)} hello\n".encode())
        super().handle()


class Lines(socketserver.ThreadingTCPServer):
    """Of both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128


class Http(ThreadingHTTPServer):
    """Of both families."""

    address_family = socket.AF_INET6
    request_queue_size = 128


def caller_of(handler: socketserver.BaseRequestHandler) -> str:
    """The client's address as the application sees it."""
    return str(handler.client_address[0]).removeprefix("::ffff:")


if __name__ == "__main__":
    for port, handler in ((LINES, Line), (FIRST, First)) if not sys.argv[1:] else ():
        threading.Thread(target=Lines(("::", port), handler).serve_forever, daemon=True).start()
    Http(("::", int(sys.argv[1]) if sys.argv[1:] else HTTP), Seen).serve_forever()
