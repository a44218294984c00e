"""Health for kubelet: /healthz is OK as long as the process answers, /readyz once all conditions hold."""

import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

_NOT_YET = "not yet"


class Readiness:
    """Named conditions that all have to hold. Safe to use from many threads."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._missing = dict.fromkeys(names, _NOT_YET)  # condition → why it does not hold; "" if it holds
        self._looks: dict[str, Callable[[], str]] = {}

    def set(self, name: str, ok: bool, why: str = "") -> None:
        """Set whether a condition holds, and if not, why. Raises KeyError for an unknown condition."""
        with self._lock:
            if name not in self._missing:
                raise KeyError(name)
            self._looks.pop(name, None)
            self._missing[name] = "" if ok else (why or _NOT_YET)

    def follow(self, name: str, why_not: Callable[[], str]) -> None:
        """Have a condition looked at from now on whenever somebody asks: `why_not` returns "" if it holds."""
        self.set(name, False)
        with self._lock:
            self._looks[name] = why_not

    def missing(self) -> dict[str, str]:
        """Each condition that does not hold, with the reason."""
        with self._lock:
            looks, found = dict(self._looks), dict(self._missing)
        found |= {name: _answer_of(look) for name, look in looks.items()}
        return {name: why for name, why in found.items() if why}

    def answers(self) -> type[BaseHTTPRequestHandler]:
        """HTTP handler for /healthz and /readyz. The body of /readyz names the conditions that do not hold."""
        readiness = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                missing = readiness.missing() if path == "/readyz" else {}
                if path not in ("/healthz", "/readyz"):
                    self._answer(HTTPStatus.NOT_FOUND, {"error": "not found; try /healthz or /readyz"})
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


def _answer_of(look: Callable[[], str]) -> str:
    """Why a condition does not hold. One that can't be looked at does not hold."""
    try:
        return look()
    except Exception as error:  # the answer names it, and the port must go on answering
        return f"can't be looked at: {error}"
