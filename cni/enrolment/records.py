"""Keeps the records small that the programs make of what each pod does: `uncaptured` and `flows`.

Such a record has one map of entries for all pods. A second map counts for each pod how many entries were ever made, and
a third how many have been removed since. From these two numbers the programs know whether the pod has room for another
entry. The agent removes the oldest ones in time.
"""

import ctypes
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bpf.layout import FLOWS_PER_POD, UNCAPTURED_PER_POD, Cookie, Quad
from bpf.tables import Table, Tables


@dataclass(frozen=True)
class Record:
    """Keys of `entries` have a cookie, values the time `last`; values of `sums` have the number `added`."""

    entries: Table[Any, Any]
    sums: Table[Cookie, Any]
    forgotten: Table[Cookie, Quad]
    most: int  # entries that a pod may have

    def forgotten_of(self, cookie: int) -> int:
        """How many of a pod's entries have been removed while it ran."""
        return int((self.forgotten.get(Cookie(cookie)) or Quad()).quad)

    def forget_oldest(self) -> int:
        """Make room where a pod has many entries; returns how many have gone. Entries of pods that have gone go too.

        Of a pod with three quarters of what it may have, half of that stays. Only one process of a node may call it.
        """
        added = {key.cookie: int(sums.added) for key, sums in self.sums.every()}
        crowded = {cookie for cookie, each in added.items() if each - self.forgotten_of(cookie) > self.most * 3 // 4}
        if not crowded:
            return 0
        ages = [(key.cookie, value.last, bytes(key)) for key, value in self.entries.every()]
        enrolled = {key.cookie for key in self.sums.every_key()}  # after the walk: one may have come
        gone = 0
        for cookie, some in groupby(sorted(ages, reverse=True), key=lambda each: each[0]):
            if cookie in crowded:
                gone += self._leave(cookie, [key for _, _, key in some], added[cookie])
            elif cookie not in enrolled:
                gone += sum(self.entries.remove(self._key(key)) for _, _, key in some)
        return gone

    def forget_pod(self, cookie: int) -> None:
        """Remove all entries of a pod that is being taken out, in one walk of the map."""
        for key in list(self.entries.every_key()):
            if key.cookie == cookie:
                self.entries.remove(key)

    def has_entries(self, cookie: int) -> bool:
        """Whether a pod has any, by its own counts; False if it has no counts."""
        sums = self.sums.get(Cookie(cookie))
        return sums is not None and int(sums.added) > self.forgotten_of(cookie)

    def _leave(self, cookie: int, keys: list[bytes], added: int) -> int:
        """Remove all but the newest of a pod's entries, of which `added` had been made before they were read.

        What is missing of those was removed before, perhaps by an agent that was killed before it could say so.
        """
        kept, old = keys[: self.most // 2], keys[self.most // 2 :]
        removed = sum(self.entries.remove(self._key(key)) for key in old)
        if self.sums.get(Cookie(cookie)):
            self.forgotten.put(Cookie(cookie), Quad(max(self.forgotten_of(cookie), added - len(kept))))
        return removed

    def _key(self, raw: bytes) -> ctypes.Structure:
        key: ctypes.Structure = self.entries.key.from_buffer_copy(raw)
        return key


def uncaptured_record(tables: Tables) -> Record:
    """What pods have sent and got past their proxies."""
    return Record(tables.uncaptured, tables.coverage, tables.forgotten, UNCAPTURED_PER_POD)


def flow_record(tables: Tables) -> Record:
    """With whom pods' connections were."""
    return Record(tables.flows, tables.flow_sums, tables.flows_forgotten, FLOWS_PER_POD)


def records(tables: Tables) -> tuple[Record, ...]:
    """All of them."""
    return uncaptured_record(tables), flow_record(tables)
