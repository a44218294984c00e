"""Keeps the records of what pods do small, and tells pods' owners of what goes past their proxies, if they asked."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from bpf.layout import Cookie, PodFlags, Way
from bpf.tables import Tables
from cni.enrolment.entries import Identity, on_uncaptured
from cni.enrolment.records import records
from cni.enrolment.uncaptured import Uncaptured, listed, sums_of
from cni.policy.decision import UNASKED
from cni.policy.pod import Pod, PodEvents
from installer.agent.looking import looking

log = structlog.get_logger("coverage")

# Between two looks a pod may make a quarter of the entries that it may have, before one is dropped
_SECONDS = 1.0
_TELL_SECONDS = 5.0  # between two looks for what pods' owners are told

Kind = tuple[Way, str, str, bool]  # way, protocol, rule, whether it was refused


@dataclass
class Coverage:
    """Forgets once a second, and tells every few.

    `has_events` says that all pods' owners are told, not only of those with audit or deny.
    """

    tables: Tables
    identities: Callable[[], Mapping[int, Identity]]
    pods_of: Callable[[Iterable[int]], Mapping[int, Pod]]
    events: PodEvents
    has_events: bool
    _sums: dict[int, int] = field(default_factory=dict)  # cookie → all that was counted at the last look
    _told: dict[int, set[Kind]] = field(default_factory=dict)
    _since: datetime = field(default_factory=lambda: datetime.now(UTC))
    _next: float = 0.0

    def look(self) -> None:
        """Forget the oldest entries where there are many, then tell of what is new."""
        for record in records(self.tables):
            if gone := record.forget_oldest():
                log.debug("record.forgotten", map=record.entries.name, entries=gone)
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _TELL_SECONDS
        wanted = {cookie: identity for cookie, identity in self.identities().items() if self._is_wanted(cookie)}
        self._told = {cookie: self._told.get(cookie, set()) for cookie in wanted}
        before, self._sums = self._sums, {cookie: self._sum(cookie) for cookie in wanted}
        changed = [cookie for cookie, count in self._sums.items() if count != before.get(cookie, 0)]
        if not changed:
            return
        pods, found = self.pods_of(changed), listed(self.tables, changed)
        for cookie in changed:
            for each in reversed(found.get(cookie, [])):
                kind = (each.way, each.protocol, each.rule, each.is_refused)
                if kind in self._told[cookie] or not self._is_told(cookie, each):
                    continue
                self._told[cookie].add(kind)
                if each.first >= self._since:  # an agent before this one has told of the others
                    self._tell(wanted[cookie], pods.get(cookie), each)

    def running(self) -> AbstractContextManager[None]:
        """Look until the end."""
        return looking("coverage", self.look, _SECONDS)

    def _is_wanted(self, cookie: int) -> bool:
        return self.has_events or self._mode(cookie) != "allow"

    def _mode(self, cookie: int) -> str:
        entry = self.tables.pods.get(Cookie(cookie))
        return on_uncaptured(PodFlags(entry.flags)) if entry else "allow"

    def _is_told(self, cookie: int, each: Uncaptured) -> bool:
        """All of it if events are wanted; else what leaves and no annotation asks for."""
        return self.has_events or (each.way is not Way.IN and each.rule in UNASKED)

    def _sum(self, cookie: int) -> int:
        sums = sums_of(self.tables, cookie)
        return sums.past + sums.refused if sums else 0

    def _tell(self, identity: Identity, pod: Pod | None, each: Uncaptured) -> None:
        what = f"{'refused' if each.is_refused else 'went past the proxy'}: {_named(each)}, rule {each.rule}"
        log.warning("traffic.uncaptured", pod=str(identity), what=what, command=each.command, uid=each.uid)
        if pod is not None:
            self.events.warning(
                pod,
                "UncapturedRefused" if each.is_refused and each.rule in UNASKED else "Uncaptured",
                f"{what}. This is the first of its kind; `sidestep coverage {identity}` lists them",
            )


def _named(each: Uncaptured) -> str:
    by = f" by {each.command}" if each.command else ""
    if each.address is None:
        return f"a socket for {each.protocol} packets was opened{by}"
    return f"{each.protocol} {'' if each.way is Way.IN else 'to '}{each.peer}{by}"
