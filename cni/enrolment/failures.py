"""Remembers when pods' connections were refused or denied, from the pods' counters.

The programs count every connection, and tell of single ones only while somebody traces. So what is known here is how
many there were between two looks, and in which direction. Where they went is in the list of what was refused
(uncaptured.py), which has each remote end once.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from bpf.layout import TOTALS, Cookie, Way
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.enrolment.uncaptured import Uncaptured, listed
from cni.policy.decision import UNASKED

MOST_PEERS = 3
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
    peers: tuple[str, ...]  # remote ends that were refused then, at most MOST_PEERS; none if the list had no room

    def document(self) -> dict[str, Any]:
        """The same as plain values; the time is UTC."""
        return vars(self) | {"at": self.at.isoformat(timespec="seconds"), "peers": list(self.peers)}


class Failures:
    """The failures of one node's pods. Beyond LIMIT, the oldest are forgotten. Any thread may call."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._before: dict[int, tuple[int, ...]] | None = None  # cookie → counts at the last look
        self._known: deque[Failure] = deque(maxlen=LIMIT)
        self._looked = datetime.now(UTC)
        self._lock = threading.Lock()

    def look(self, identities: Mapping[int, Identity]) -> None:
        """Note what has failed since the last look. The first look only notes what there has been."""
        with self._lock:
            now = {cookie: self._counts(cookie) for cookie in identities}
            at = datetime.now(UTC)
            if self._before is not None:
                new = {
                    cookie: each
                    for cookie, counts in now.items()
                    if (each := list(_since(self._before.get(cookie, ()), counts, str(identities[cookie]), at)))
                }
                every = listed(self._tables, new) if new else {}
                for cookie, some in new.items():
                    self._known.extend(_with_peers(each, every.get(cookie, []), self._looked) for each in some)
            self._before, self._looked = now, at

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
            yield Failure(at, pod, direction, verdict, more, ())


def _with_peers(failure: Failure, entries: Iterable[Uncaptured], since: datetime) -> Failure:
    some = (each for each in entries if each.is_refused and each.last >= since and _kind(each) == _kind_of(failure))
    return replace(failure, peers=tuple(each.peer for each in islice(some, MOST_PEERS)))


def _kind(each: Uncaptured) -> tuple[str, str]:
    """Direction and verdict, as TOTALS has them: what an annotation refuses is denied."""
    if each.way is Way.IN:
        return "inbound", "denied" if each.rule == "deny" else "refused"
    return "outbound", "denied" if each.rule in ("deny", *UNASKED) else "refused"


def _kind_of(failure: Failure) -> tuple[str, str]:
    return failure.direction, failure.verdict
