"""Which pods are in the maps, and what they have there: read back from the maps at start, and asked without a walk.

The maps are the state; what is kept here beside them is an index by pod.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from bpf import attachment, links
from bpf.layout import Cookie, PodEntry, PodFlags
from bpf.pins import Pins
from bpf.tables import Table, Tables
from cni.enrolment import rows
from cni.enrolment.entries import Entries, Identity
from cni.enrolment.rows import rows_of

_NOBODY = Identity("", "", "", "", "", "")
Keys = set[tuple[str, bytes]]  # by table


class Known(NamedTuple):
    """Whose pod it is, and what it has in the tables."""

    identity: Identity
    keys: Keys


class Enrolled:
    """The pods of this node in the maps, as one may ask for them. Safe to use from many threads."""

    def __init__(self, pins: Pins, tables: Tables) -> None:
        self._pins = pins
        self._tables = tables
        self._lock = threading.RLock()
        self._index = self._read_back()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Nobody else enrols or removes a pod meanwhile."""
        with self._lock:
            yield

    def entry(self, cookie: int) -> PodEntry | None:
        """The pod's own entry as the programs see it; None when it is not enrolled."""
        return self._tables.pods.get(Cookie(cookie))

    def cookies(self) -> list[int]:
        """Every enrolled pod."""
        with self._lock:
            return list(self._index)

    def identities(self) -> dict[int, Identity]:
        """Whose each enrolled namespace is."""
        with self._lock:
            return {cookie: known.identity for cookie, known in self._index.items()}

    def unsteered(self) -> set[int]:
        """The pods whose inbound steering link is gone: their namespace is dead, or somebody has removed it."""
        with self._lock:
            return {cookie for cookie in self._index if not links.pod_link_alive(self._pins, cookie)}

    def unheard(self) -> dict[int, int]:
        """The pods of which no proxy listens for inbound connections, as far as the programs know: cookie → inode."""
        with self._lock:
            heard = {key.cookie for key in self._tables.listeners.every_key()}
            return {
                cookie: inode
                for cookie, inode in links.linked_pods(self._pins)
                if inode and cookie in self._index and cookie not in heard
            }

    def of_attachment(self, container_id: str, ifname: str, netns_cookie: int | None = None) -> list[int]:
        """The cookies enrolled by one container and interface: what a DEL may remove, with or without a namespace.

        Of an adopted pod the sandbox's container is not always known; its namespace, where the DEL comes with one, is.
        """
        with self._lock:
            return [
                cookie
                for cookie, known in self._index.items()
                if known.identity.ifname == ifname
                and (
                    known.identity.container_id == container_id
                    or (known.identity.is_adopted and cookie == netns_cookie)
                )
            ]

    def of_network(self, network: str) -> dict[int, Identity]:
        """Everything enrolled through one CNI network, by cookie: what a GC looks through."""
        with self._lock:
            return {
                cookie: known.identity for cookie, known in self._index.items() if known.identity.network == network
            }

    def differences(self, cookie: int, entries: Entries) -> list[str]:
        """How the maps differ from what the pod should have; a sentence each, empty when they agree."""
        found = []
        if not links.pod_link_alive(self._pins, cookie):
            found.append("the namespace has no inbound steering (sk_lookup) link")
        pod = self._tables.pods.get(Cookie(cookie))
        if pod is None:
            return [*found, f"no entry in pods for {entries.identity} (netns cookie {cookie})"]
        if bytes(pod) != bytes(_as_adopted(entries, Identity.of(pod)).pod()):
            found.append(
                f"entry of {entries.identity} is {Identity.of(pod)} with flags {PodFlags(pod.flags)!s}, "
                f"should have flags {entries.flags!s}, or differs in proxy ids, sources or counts"
            )
        for row in rows_of(cookie, entries):
            stored = self._table(row.table).get(row.key)
            if stored is None or bytes(stored) != bytes(row.value):
                found.append(row.meaning)
        return found

    def damaged(self) -> dict[int, Identity]:
        """The pods that miss entries which they have been given: somebody has taken them out of the tables."""
        with self._lock:
            return {
                cookie: known.identity
                for cookie, known in self._index.items()
                if known.identity.name and not self._is_whole(cookie, known.keys)
            }

    def is_attached(self) -> bool:
        """Whether all programs are pinned and their global links attached."""
        return attachment.is_attached(self._pins)

    def is_captured(self, cookie: int) -> bool:
        """Whether connections of an enrolled pod are decided on in both directions: cheap enough for every ADD."""
        if not attachment.is_deciding(self._pins) or not links.pod_link_alive(self._pins, cookie):
            return False
        return attachment.is_pinned(
            self._pins, "pods", self._tables.pods.descriptor
        )  # whoever attaches anew makes other tables

    def __len__(self) -> int:
        with self._lock:
            return len(self._index)

    def _is_whole(self, cookie: int, keys: Keys) -> bool:
        if self._tables.pods.get(Cookie(cookie)) is None:
            return False
        for name, raw in keys:
            key = self._table(name).key.from_buffer_copy(raw)
            if self._table(name).get(key) is None:
                return False
        return True

    def _table(self, name: str) -> Table[Any, Any]:
        table: Table[Any, Any] = getattr(self._tables, name)
        return table

    def _read_back(self) -> dict[int, Known]:
        """The index as the maps have it, half-written pods of a crash included (their name is then unknown)."""
        index = {key.cookie: Known(Identity.of(pod), set()) for key, pod in self._tables.pods.every()}
        for name in rows.TABLES:
            for key in self._table(name).every_key():
                index.setdefault(key.cookie, Known(_NOBODY, set())).keys.add((name, bytes(key)))
        return index


def _as_adopted(entries: Entries, stored: Identity) -> Entries:
    """What a pod should have; where no CNI call has enrolled it, that need not say by which attachment."""
    if not stored.is_adopted:
        return entries
    known = replace(entries.identity, container_id=stored.container_id, network=stored.network, ifname=stored.ifname)
    return replace(entries, identity=known)
