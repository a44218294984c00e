"""`python -m tests.lab.zds_process SOCKET [PEERS]`: a double of ztunnel as a process, from ZDS to pods' connections.

It ends with its stdin, or by SIGTERM: then it listens no more, and open connections have a moment to end. Without PEERS
clients of pods get one line of JSON, as tests/lab/ztunnel.py says. With it, bytes pass as they are, and all that it
sees goes to stdout, a line of JSON each. PEERS is a file with the addresses that are reached by a tunnel; it is read
anew for each connection. Whether it is ready is told at port 15021, as ztunnel does.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.lab import zds_client, ztunnel

_READINESS = 15021
_LINGER = 2.0  # seconds


class _Serving:
    """A pod that is served."""

    def __init__(self, uid: str, netns: int, peers: "_Peers | None") -> None:
        found = os.fstat(netns)
        self.namespace = found.st_dev, found.st_ino
        self._proxies = ztunnel.Ztunnel() if peers is None else ztunnel.Ztunnel(False, peers, _tell)
        try:
            self._proxies.add(uid, netns)
        except OSError as error:
            raise zds_client.StartError(f"failure to start proxy: {error.strerror}") from error
        finally:
            os.close(netns)

    def close(self) -> None:
        self._proxies.close()


class _Peers:
    """Addresses in a file. What istiod tells a ztunnel, somebody else writes there for its double."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __contains__(self, address: object) -> bool:
        return self._path.exists() and address in self._path.read_text().split()


class _Telling(zds_client.Ztunnel):
    """Tells of each message, before it is answered."""

    def _note(self, message: zds_client.Message) -> None:
        super()._note(message)
        _tell({"who": "zds", **message._asdict()})


def _tell(seen: dict[str, Any]) -> None:
    print(f"{json.dumps(seen)}\n", end="", flush=True)


def _serve_readiness(client: zds_client.Ztunnel) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if client.is_ready else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    threading.Thread(target=ThreadingHTTPServer(("", _READINESS), Ready).serve_forever, daemon=True).start()


def _run(path: Path, peers: _Peers | None) -> None:
    kind = zds_client.Ztunnel if peers is None else _Telling
    with kind(path, start=lambda uid, netns: _Serving(uid, netns, peers)).running() as client:
        if peers is not None:
            _serve_readiness(client)
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _run(Path(sys.argv[1]), _Peers(Path(sys.argv[2])) if sys.argv[2:] else None)
    except SystemExit:
        time.sleep(_LINGER)
