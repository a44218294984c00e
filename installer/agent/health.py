"""What kubelet is told: /healthz as long as the process answers, /readyz once all its conditions hold."""

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

_NOT_YET = "not yet"


class Readiness:
    """Named conditions that all have to hold. Safe to use from many threads."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._missing = dict.fromkeys(names, _NOT_YET)  # condition → why it does not hold; "" when it does

    def set(self, name: str, ok: bool, why: str = "") -> None:
        """Say whether a condition holds, or why not."""
        with self._lock:
            if name not in self._missing:
                raise KeyError(name)
            self._missing[name] = "" if ok else (why or _NOT_YET)

    def missing(self) -> dict[str, str]:
        """The conditions that do not hold, and why."""
        with self._lock:
            return {name: why for name, why in self._missing.items() if why}

    def answers(self) -> type[BaseHTTPRequestHandler]:
        """A handler of /healthz and /readyz; the body names what is missing."""
        readiness = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                missing = readiness.missing() if path == "/readyz" else {}
                if path not in ("/healthz", "/readyz"):
                    self._answer(HTTPStatus.NOT_FOUND, {"error": "there are /healthz and /readyz"})
                elif missing:
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"missing": missing})
                else:
                    self._answer(HTTPStatus.OK, {"status": "ok"})

            def _answer(self, status: HTTPStatus, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode() + b"\n"
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        return Handler
