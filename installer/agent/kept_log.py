"""Keeps the agent's last log lines, for bug reports: the container's own log may be gone, or out of reach."""

import sys
from collections import deque

KEPT = 500  # lines; with 500 bytes each a quarter of a MiB


class KeptLog:
    """A file for structlog: what is written goes to standard error, its last lines are kept. Any thread may call."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT)

    def write(self, text: str) -> int:
        """Write a line; keep it."""
        self._lines.extend(text.splitlines())
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Write what standard error still holds back."""
        sys.stderr.flush()

    def lines(self) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines.copy())
