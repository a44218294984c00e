"""The one place that writes pods into the kernel: entries and the sk_lookup link go in, or come back out.

All or nothing: every step of an enrolment leaves its undoing on a stack, and the pod's own entry, without which the
programs see no pod, is written last and removed first. The maps are the state; what is kept here beside them is an
index by pod that is read back from them at start.
"""

import ctypes
import socket
import struct
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from bpf import attachment, links
from bpf.errors import SidestepError
from bpf.layout import LISTENER_SLOTS, Address, Cookie, ListenerKey, Pod, PodFlags, Quad, Word
from bpf.pins import Pins
from bpf.tables import Table, Tables
from cni import rows
from cni.entries import Entries, Identity, Surroundings
from cni.errors import RegistrationFailed
from cni.rows import Row, lasting_rows, live_rows

_NOBODY = Identity("", "", "", "", "", "")
Keys = set[tuple[str, bytes]]  # by table
_SO_COOKIE = 57  # uapi/asm-generic/socket.h, Linux 4.12


class _Known(NamedTuple):
    """Whose pod it is, and what it has in the tables."""

    identity: Identity
    keys: Keys


class Enrolments:
    """The pods of this node in the maps. Safe to use from many threads."""

    def __init__(self, pins: Pins, tables: Tables) -> None:
        self._pins = pins
        self._tables = tables
        self._lock = threading.RLock()
        self._index = self._read_back()

    def add(self, cookie: int, entries: Entries, netns_fd: int) -> None:
        """Enrol a pod, or bring its enrolment up to date; on any error nothing has changed.

        Raises RegistrationFailed naming the table, address or link that stood in the way.
        """
        with self._lock, ExitStack() as undo:
            before = self._index.get(cookie)
            lasting, live = list(lasting_rows(cookie, entries)), list(live_rows(cookie, entries.surroundings))
            try:
                pod = entries.pod()
                for row in lasting:
                    self._put(undo, row)
                self._begin_counting(undo, cookie)
                if links.link_pod(self._pins, cookie, netns_fd):
                    undo.callback(links.unlink_pod, self._pins, cookie)
                for row in live:
                    self._claim(row, cookie)
                    self._put(undo, row)
                _put(undo, self._tables.pods, Cookie(cookie), pod)
            except SidestepError as error:
                if isinstance(error, RegistrationFailed):
                    raise
                raise RegistrationFailed(f"{entries.identity} could not be enrolled: {error}") from error
            undo.pop_all()
            self._index[cookie] = _Known(entries.identity, _keys([*lasting, *live]))
            if before:
                self._drop(before.keys - self._index[cookie].keys)

    def follow(self, cookie: int, surroundings: Surroundings) -> list[str]:
        """Bring a pod's addresses, routes and interfaces up to date; nothing happens to one that is gone.

        Returns a sentence for each address that another pod of this node has; inbound connections to it stay with that.
        Raises TableFull, with what fitted in place.
        """
        with self._lock:
            known, pod = self._index.get(cookie), self._tables.pods.get(Cookie(cookie))
            if known is None or pod is None:
                return []
            conflicts, live = [], []
            for row in live_rows(cookie, surroundings):
                try:
                    self._claim(row, cookie)
                except RegistrationFailed as error:
                    conflicts.append(str(error))
                else:
                    live.append(row)
            lasting = {key for key in known.keys if key[0] in rows.LASTING}
            self._index[cookie] = _Known(known.identity, known.keys | _keys(live))
            for row in live:
                self._table(row.table).put(row.key, row.value)
            self._index[cookie] = _Known(known.identity, lasting | _keys(live))
            self._drop(known.keys - self._index[cookie].keys)
            pod.source4, pod.source6 = Address.of(surroundings.source4), Address.of(surroundings.source6)
            pod.flags = pod.flags | PodFlags.ROUTES if surroundings.ways else pod.flags & ~PodFlags.ROUTES
            self._tables.pods.put(Cookie(cookie), pod)
            return conflicts

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Nobody else enrols or removes a pod meanwhile."""
        with self._lock:
            yield

    def entry(self, cookie: int) -> Pod | None:
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

    def steer(self, cookie: int, netns_fd: int) -> bool:
        """Give a pod its steering link again; False when it isn't enrolled any more. Raises KernelRefused."""
        with self._lock:
            if cookie not in self._index:
                return False
            links.unlink_pod(self._pins, cookie)
            return links.link_pod(self._pins, cookie, netns_fd)

    def add_listener(self, cookie: int, port: int, listener: socket.socket) -> bool:
        """Give a pod's proxy one more listening socket for inbound connections.

        False when it has this one already, or all its slots are taken. `port` is in host order. Raises KernelRefused
        for a socket that does not listen.
        """
        (own,) = struct.unpack("=Q", listener.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))
        table = self._tables.listeners
        keys = [ListenerKey(cookie, port, slot) for slot in range(LISTENER_SLOTS)]
        slots = [table.get(key) for key in keys]  # user space reads a socket's cookie where it writes a descriptor
        if any(taken and taken.quad == own for taken in slots):
            return False
        free = (key for key, taken in zip(keys, slots, strict=True) if taken is None)
        return any(table.insert(key, Quad(listener.fileno())) for key in free)  # sockops may be quicker

    def unheard(self) -> dict[int, int]:
        """The pods of which no proxy listens for inbound connections, as far as the programs know: cookie → inode."""
        with self._lock:
            heard = {key.cookie for key in self._tables.listeners.every_key()}
            return {
                cookie: inode
                for cookie, inode in links.linked_pods(self._pins)
                if inode and cookie in self._index and cookie not in heard
            }

    def has_started(self, cookie: int) -> None:
        """Say that a pod's proxy takes outbound connections, for pods that let them through until then."""
        self._tables.started.put(Cookie(cookie), Word(1))

    def remove(self, cookie: int) -> bool:
        """Take a pod out; False when it was not in. Its open connections go on, new ones are not captured."""
        with self._lock:
            known = self._index.pop(cookie, None)
            if known is None:
                return False
            self._tables.pods.remove(Cookie(cookie))
            links.unlink_pod(self._pins, cookie)
            self._drop(known.keys)
            for table in (self._tables.proxies, self._tables.started):
                table.remove(Cookie(cookie))
            for counters in self._tables.counters:
                counters.remove(Cookie(cookie))
            return True

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
        for row in (*lasting_rows(cookie, entries), *live_rows(cookie, entries.surroundings)):
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

    def reclaim(self, spared: Collection[int] = ()) -> list[Identity]:
        """Remove what dead namespaces and interrupted ADDs have left; returns whose it was, where that is known.

        Without a link a namespace counts as dead, except those in `spared`.
        """
        with self._lock:
            linked = dict(links.linked_pods(self._pins))
            alive = {cookie for cookie, inode in linked.items() if inode} | set(spared)
            # without a name it is what a crash in the middle of an ADD has left, which never succeeded
            dead = [key for key, known in self._index.items() if key not in alive or not known.identity.name]
            gone = [self._index[key].identity for key in dead if self._index[key].identity.name]
            for cookie in dead:
                self.remove(cookie)
            for cookie in linked:
                if cookie not in alive or cookie not in self._index:
                    links.unlink_pod(self._pins, cookie)
            return gone

    def is_attached(self) -> bool:
        """Whether all programs are pinned and their global links attached."""
        return attachment.is_attached(self._pins)

    def __len__(self) -> int:
        with self._lock:
            return len(self._index)

    def _claim(self, row: Row, cookie: int) -> None:
        """Make sure no other live pod has the address of a row: inbound steering finds pods by it."""
        if row.table != "addresses":
            return
        owner = self._tables.addresses.get(Address.from_buffer_copy(row.key))
        if owner is None or owner.cookie == cookie:
            return
        if links.pod_link_alive(self._pins, owner.cookie):
            other = self._index.get(owner.cookie)
            address = Address.from_buffer_copy(row.key).ip()
            raise RegistrationFailed(
                f"address {address} belongs to {other.identity if other else 'another pod'} on this node; "
                "two running mesh pods cannot share one"
            )
        self.remove(owner.cookie)

    def _is_whole(self, cookie: int, keys: Keys) -> bool:
        if self._tables.pods.get(Cookie(cookie)) is None:
            return False
        for name, raw in keys:
            key = self._table(name).key.from_buffer_copy(raw)
            value = self._table(name).get(key)
            if value is None or rows.cookie_of_row(name, key, value) != cookie:
                return False
        return True

    def _table(self, name: str) -> Table[Any, Any]:
        table: Table[Any, Any] = getattr(self._tables, name)
        return table

    def _put(self, undo: ExitStack, row: Row) -> None:
        _put(undo, self._table(row.table), row.key, row.value)

    def _drop(self, keys: Keys) -> None:
        for name, raw in keys:
            table = self._table(name)
            table.remove(table.key.from_buffer_copy(raw))

    def _begin_counting(self, undo: ExitStack, cookie: int) -> None:
        for table in self._tables.counters:
            if table.begin(Cookie(cookie)):
                undo.callback(table.remove, Cookie(cookie))

    def _read_back(self) -> dict[int, _Known]:
        """The index as the maps have it, half-written pods of a crash included (their name is then unknown)."""
        index = {key.cookie: _Known(Identity.of(pod), set()) for key, pod in self._tables.pods.every()}
        for cookie in index:  # an earlier version of us did not count
            self._begin_counting(ExitStack(), cookie)
        for name in rows.TABLES:
            for key, value in self._table(name).every():
                cookie = rows.cookie_of_row(name, key, value)
                index.setdefault(cookie, _Known(_NOBODY, set())).keys.add((name, bytes(key)))
        return index


def _as_adopted(entries: Entries, stored: Identity) -> Entries:
    """What a pod should have; where no CNI call has enrolled it, that need not say by which attachment."""
    if not stored.is_adopted:
        return entries
    known = replace(entries.identity, container_id=stored.container_id, network=stored.network, ifname=stored.ifname)
    return replace(entries, identity=known)


def _keys(of: Iterable[Row]) -> Keys:
    return {(row.table, bytes(row.key)) for row in of}


def _put(undo: ExitStack, table: Table[Any, Any], key: ctypes.Structure, value: ctypes.Structure) -> None:
    """Write an entry and leave its undoing: the old value back, or the entry out again."""
    before = table.get(key)
    table.put(key, value)
    if before is None:
        undo.callback(table.remove, key)
    else:
        undo.callback(table.put, key, before)
