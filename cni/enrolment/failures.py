"""Remembers when pods' connections were refused or denied, from the pods' counters.

The programs count every connection, and tell of single ones only while somebody traces. So what is known here is how
many there were between two looks, and in which direction; not where they went.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bpf.layout import TOTALS, Cookie
from bpf.tables import Tables
from cni.enrolment.entries import Identity

LIMIT = 1000  # looks at which a pod had new ones
_FAILED = ("refused", "denied")


@dataclass(frozen=True)
class Failure:
    """Connections of one pod that failed in the same way between two looks. `at` is the later look."""

    at: datetime
    pod: str
    direction: str
    verdict: str
    count: int

    def document(self) -> dict[str, Any]:
        """The same as plain values; the time is UTC."""
        return vars(self) | {"at": self.at.isoformat(timespec="seconds")}


class Failures:
    """The failures of one node's pods. Beyond LIMIT, the oldest are forgotten. Any thread may call."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._before: dict[int, tuple[int, ...]] | None = None  # cookie → counts at the last look
        self._known: deque[Failure] = deque(maxlen=LIMIT)
        self._lock = threading.Lock()

    def look(self, identities: Mapping[int, Identity]) -> None:
        """Note what has failed since the last look. The first look only notes what there has been."""
        with self._lock:
            now = {cookie: self._counts(cookie) for cookie in identities}
            if self._before is not None:
                at = datetime.now(UTC)
                for cookie, counts in now.items():
                    self._known.extend(_since(self._before.get(cookie, ()), counts, str(identities[cookie]), at))
            self._before = now

    def documents(self) -> list[dict[str, Any]]:
        """Each as plain values, the latest last."""
        with self._lock:
            return [each.document() for each in self._known]

    def _counts(self, cookie: int) -> tuple[int, ...]:
        tally = self._tables.tallies.get(Cookie(cookie))
        return tuple(tally.connections) if tally else ()


def _since(before: tuple[int, ...], now: tuple[int, ...], pod: str, at: datetime) -> Iterator[Failure]:
    """What has failed in between. A counter that is lower than before has started again from 0."""
    for number, count in enumerate(now):
        direction, verdict = TOTALS[number]
        earlier = before[number] if before else 0
        more = count - earlier if count >= earlier else count
        if more and verdict in _FAILED:
            yield Failure(at, pod, direction, verdict, more)
