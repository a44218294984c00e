"""Runs in a pod, with the standard library alone: asks servers without a pause, and counts.

`client.py FOLDER` waits for FLOWS in the folder: a list in JSON, each with the `name` to count under, `kind` (http,
lines or first), `host`, `port`, the `server` that has to answer, and the `identity` that its proxy has to name ("" for
none). Of two requests of a flow, one goes over a connection that is kept and one over a new one. COUNTS in the folder
has the counts in JSON, renewed a few times a second.
"""

import http.client
import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

FLOWS, COUNTS = "flows.json", "counts.json"
_PAUSE = 0.1  # seconds between two requests of a flow
_PATIENCE = 10  # seconds until a request without an answer has failed
_PROXY = "127.0.0.6"  # where a sidecar connects to its application from
_KEPT = 20  # of the failures, with their words


class Wrong(Exception):
    """An answer came, but another one than it has to be."""


class Http:
    """One connection."""

    def __init__(self, flow: dict[str, Any]) -> None:
        self._flow = flow
        self._connection = http.client.HTTPConnection(flow["host"], flow["port"], timeout=_PATIENCE)
        self._connection.connect()

    def ask(self) -> None:
        self._connection.request("GET", "/")
        answer = self._connection.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            raise Wrong(f"{answer.status} {text}")
        told = json.loads(text)
        check(self._flow, told["server"], told["caller"])
        headers = {name.lower(): value for name, value in told["headers"].items()}
        named = headers.get("x-forwarded-client-cert", "")
        if self._flow["identity"] not in named or bool(self._flow["identity"]) != bool(named):
            raise Wrong(f"the proxies named {named or 'nobody'}")

    def close(self) -> None:
        self._connection.close()


class Lines:
    """One connection over which lines are sent and answered."""

    def __init__(self, flow: dict[str, Any]) -> None:
        self._flow = flow
        self._socket = socket.create_connection((flow["host"], flow["port"]), _PATIENCE)
        self._answers = self._socket.makefile("r")
        if flow["kind"] == "first":
            self._read("hello")

    def ask(self) -> None:
        line = str(time.monotonic_ns())
        self._socket.sendall(f"{line}\n".encode())
        self._read(line)

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def _read(self, wanted: str) -> None:
        answer = self._answers.readline()
        if not answer:
            raise Wrong("the connection was closed")
        server, caller, line = answer.split()
        check(self._flow, server, caller)
        if line != wanted:
            raise Wrong(f"{line} answers {wanted}")


def check(flow: dict[str, Any], server: str, caller: str) -> None:
    """The right server has answered, and its proxy has passed the connection on."""
    if (server, caller) != (flow["server"], _PROXY):
        raise Wrong(f"answered by {server}, which was called from {caller}")


class Flow(threading.Thread):
    """One kind of request to one place."""

    def __init__(self, flow: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.flow, self.kind = flow, Http if flow["kind"] == "http" else Lines
        self.sent = self.failed = self.opened = 0
        self.failures: list[str] = []
        self.kept: Http | Lines | None = None

    def run(self) -> None:
        while True:
            for ask in (self.ask_kept, self.ask_new):
                try:
                    ask()
                except (OSError, ValueError, Wrong, http.client.HTTPException) as error:
                    self.failed += 1
                    words = f"{time.strftime('%H:%M:%S')} {ask.__name__}: {type(error).__name__}: {error}"
                    self.failures = [*self.failures, words][-_KEPT:]
                self.sent += 1
                time.sleep(_PAUSE)

    def ask_kept(self) -> None:
        connection, self.kept = self.kept or self.open(), None
        connection.ask()
        self.kept = connection

    def ask_new(self) -> None:
        connection = self.open()
        try:
            connection.ask()
        finally:
            connection.close()

    def open(self) -> Http | Lines:
        connection = self.kind(self.flow)
        self.opened += 1
        return connection

    def counts(self) -> dict[str, Any]:
        return {"sent": self.sent, "failed": self.failed, "opened": self.opened, "failures": self.failures}


def main(folder: Path) -> None:
    while not (folder / FLOWS).exists():
        time.sleep(0.1)
    running = [Flow(each) for each in json.loads((folder / FLOWS).read_text())]
    for each in running:
        each.start()
    fresh = folder / f"{COUNTS}.new"
    while True:
        fresh.write_text(json.dumps({each.flow["name"]: each.counts() for each in running}))
        fresh.rename(folder / COUNTS)
        time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
