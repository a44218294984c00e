"""What kubelet is told: /healthz as long as the process answers, /readyz once all its conditions hold."""

import json
import threading
from collections.abc import Callable, Iterable
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

    @property
    def is_ready(self) -> bool:
        """Whether all conditions hold."""
        return not self.missing()

    def missing(self) -> dict[str, str]:
        """The conditions that do not hold, and why."""
        with self._lock:
            return {name: why for name, why in self._missing.items() if why}

    def application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """WSGI: /healthz and /readyz; the body names what is missing."""
        path = environ.get("PATH_INFO")
        missing = self.missing() if path == "/readyz" else {}
        if path not in ("/healthz", "/readyz"):
            return _answer(start_response, "404 Not Found", {"error": "there are /healthz and /readyz"})
        if missing:
            return _answer(start_response, "503 Service Unavailable", {"missing": missing})
        return _answer(start_response, "200 OK", {"status": "ok"})


def _answer(start_response: Callable[..., Any], status: str, body: dict[str, Any]) -> Iterable[bytes]:
    text = json.dumps(body).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(text)))])
    return [text]
