"""The mesh's application: an HTTP server that answers with who it is and what it sees. Runs as `python3 -I -S`."""

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

NAME, PORTS = sys.argv[1], [int(port) for port in sys.argv[2:]]


class Answer(BaseHTTPRequestHandler):
    """GET /anything → {"pod", "peer", "peer_port", "local", "path", "identities"}; ?bytes=N → that many bytes."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment a reply: two would wait for each other's acknowledgement

    def do_GET(self) -> None:
        wanted = parse_qs(urlsplit(self.path).query).get("bytes")
        seen = {
            "pod": NAME,
            "peer": plain(self.connection.getpeername()[0]),
            "peer_port": self.connection.getpeername()[1],
            "local": plain(self.connection.getsockname()[0]),
            "path": self.path,
            "identities": self.headers.get("X-Forwarded-Client-Cert", ""),
        }
        body = b"x" * int(wanted[0]) if wanted else json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class DualStack(ThreadingHTTPServer):
    """Both families on one socket, as most runtimes do."""

    address_family = socket.AF_INET6
    request_queue_size = 256
    daemon_threads = True


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


if __name__ == "__main__":
    servers = [DualStack(("::", port), Answer) for port in PORTS]
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    servers[0].serve_forever()
