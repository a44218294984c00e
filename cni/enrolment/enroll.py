"""The one place that writes pods into the kernel and removes them: their map entries and their sk_lookup link.

An enrolment succeeds as a whole or changes nothing: each step puts its undo on a stack. The pod's own entry is written
last and removed first, because the programs ignore a pod without it.
"""

import ctypes
import errno
import socket
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

from bpf import links
from bpf.errors import KernelRefused, SidestepError, TableFull
from bpf.layout import (
    INBOUND_PORT,
    LISTENER_SLOTS,
    Address,
    Cookie,
    ListenerKey,
    NetworkVerdict,
    PodEntry,
    PodFlags,
    PortRule,
    Quad,
    Word,
)
from bpf.layouts import other_layouts, steered
from bpf.pins import Pins
from bpf.steering import load_instance
from bpf.syscalls import Descriptor
from bpf.tables import Table, Tables
from cni.enrolment import rows, terms
from cni.enrolment.enrolled import Enrolled, Keys, Known, lasting
from cni.enrolment.entries import Entries, Identity, on_uncaptured, sandbox_flags
from cni.enrolment.records import records
from cni.enrolment.rows import TableRow, live_rows, rows_of, term_rows
from cni.enrolment.terms import Terms
from cni.errors import RegistrationFailed
from cni.netns.sandbox import Sandbox
from cni.policy.annotations import OnUncaptured

_POLICIES = 1 << 16  # numbers of policies: struct pod has 16 bits for one


class Change(NamedTuple):
    """The terms of a pod before and after a change."""

    before: Terms
    after: Terms


class Enrolments(Enrolled):
    """Enrols, changes and removes the pods of this node. Safe to use from many threads."""

    def __init__(self, pins: Pins, tables: Tables) -> None:
        super().__init__(pins, tables)
        self._links = links.RetainedLinks(pins)
        for cookie in self._index:
            self._links.retain(cookie)
        for cookie in self._index:  # a pod that an earlier version of sidestep enrolled may have no counters
            self._begin_counting(ExitStack(), cookie)
        self.settle()  # an agent may have ended between a change and its settling

    def add(self, cookie: int, entries: Entries, netns_fd: int) -> None:
        """Enrol a pod, or bring its enrolment up to date. `netns_fd` is a descriptor of its network namespace.

        Raises RegistrationFailed that names the table or link in the way; the maps are then as before.
        """
        try:
            with self._instance(cookie) as instance, self.undisturbed(cookie), ExitStack() as undo:
                policy = self._policy_for(cookie, entries)
                wanted = list(rows_of(cookie, entries, policy))
                self._begin_counting(undo, cookie)
                if links.link_pod(self._pins, cookie, netns_fd, instance.fd):
                    undo.callback(links.unlink_pod, self._pins, cookie)
                for row in wanted:
                    _put(undo, self._table(row.table), row.key, row.value)
                _put(undo, self._tables.pods, Cookie(cookie), entries.pod(policy))
                undo.pop_all()
                before, self._index[cookie] = self._index.get(cookie), Known(entries.identity, _keys(wanted))
                self._links.retain(cookie)
                if before:
                    gone = before.keys - self._index[cookie].keys
                    self._superseded.add(lasting(gone))
                    self._drop(gone - lasting(gone))
            self.settle()
        except SidestepError as error:
            raise RegistrationFailed(f"{entries.identity} could not be enrolled: {error}") from error

    def follow(self, cookie: int, sandbox: Sandbox, excluded_interfaces: Collection[str]) -> None:
        """Bring a pod's addresses, routes and interfaces up to date. Does nothing if the pod is not enrolled any more.

        Raises TableFull; the rows that fitted are then in place.
        """
        with self.undisturbed(cookie):
            known, pod = self._index.get(cookie), self._tables.pods.get(Cookie(cookie))
            if known is None or pod is None:
                return
            before, live = bytes(pod), list(live_rows(cookie, sandbox, excluded_interfaces))
            gone = {key for key in known.keys if key[0] not in rows.LASTING} - _keys(live)
            known.keys.update(_keys(live))
            for row in live:
                self._table(row.table).put(row.key, row.value)
            self._drop(gone)
            known.keys.difference_update(gone)
            pod.source4, pod.source6 = Address.of(sandbox.source(4)), Address.of(sandbox.source(6))
            for flag, wanted in sandbox_flags(sandbox):
                pod.flags = pod.flags | flag if wanted else pod.flags & ~flag
            if bytes(pod) != before:
                self._tables.pods.put(Cookie(cookie), pod)

    def change(self, cookie: int, revise: Callable[[Terms], Terms]) -> Change | None:
        """Put the terms in force that `revise` makes of those in force now. None if nothing changes.

        New connections meet the old terms or the new ones, never parts of both. The rows of the old ones stay until
        settle() is called. Does nothing if the pod is not enrolled any more. Raises TableFull and KernelRefused; then
        the old terms are in force.
        """
        try:
            return self._change(cookie, revise)
        except TableFull:  # perhaps rows of older terms are in the way
            self.settle()
            return self._change(cookie, revise)

    def _change(self, cookie: int, revise: Callable[[Terms], Terms]) -> Change | None:
        with self.undisturbed(cookie), ExitStack() as undo:
            known, pod = self._index.get(cookie), self._tables.pods.get(Cookie(cookie))
            if known is None or pod is None:
                return None
            before = self._terms(pod, known.keys)
            after = revise(before)
            if after == before:
                return None
            has_other_rows = (before.port_rules, before.networks) != (after.port_rules, after.networks)
            policy = _next(pod.policy) if has_other_rows else pod.policy
            fresh = list(term_rows(cookie, after, policy)) if has_other_rows else []
            for row in fresh:
                _put(undo, self._table(row.table), row.key, row.value)
            pod.flags, pod.policy = PodFlags(pod.flags) & ~terms.FLAGS | after.flags, policy
            pod.port_rules, pod.networks = len(after.port_rules), len(after.networks)
            self._tables.pods.put(Cookie(cookie), pod)
            undo.pop_all()
            old = lasting(known.keys) if has_other_rows else set()
            known.keys.difference_update(old)
            known.keys.update(_keys(fresh))
            self._superseded.add(old)
            return Change(before, after)

    def shadows(self) -> list[int]:
        """The cookies of the shadow pods."""
        entries = ((cookie, self._tables.pods.get(Cookie(cookie))) for cookie in self.cookies())
        return [cookie for cookie, pod in entries if pod and PodFlags(pod.flags) & PodFlags.SHADOW]

    def watch_only(self, cookie: int) -> bool:
        """Let the programs decide for a pod but capture nothing more: from now on it is a shadow pod.

        What they have captured already goes on. Returns False if the pod is not enrolled any more.
        """
        return self._set_shadow(cookie, PodFlags.SHADOW)

    def capture_again(self, cookie: int) -> bool:
        """Let the programs capture the new connections of a shadow pod. False if it is not enrolled any more."""
        return self._set_shadow(cookie, PodFlags(0))

    def _set_shadow(self, cookie: int, flag: PodFlags) -> bool:
        with self.undisturbed(cookie):
            pod = self._tables.pods.get(Cookie(cookie))
            if pod is None or cookie not in self._index:
                return False
            pod.flags = PodFlags(pod.flags) & ~PodFlags.SHADOW | flag
            self._tables.pods.put(Cookie(cookie), pod)
            return True

    def settle(self) -> None:
        """Remove the rows of terms that are not in force any more. Waits, about 20 ms, for programs that run now."""
        self._superseded.drop_with(self._drop)

    def _terms(self, pod: PodEntry, keys: Keys) -> Terms:
        """The terms that a pod's entry and its rows give."""
        ports, networks = {}, {}
        for name, raw in lasting(keys):
            value = self._table(name).get(key := self._table(name).key.from_buffer_copy(raw))
            if value is not None and name == "port_rules":
                ports[key.port] = PortRule(value.word)
            elif value is not None:
                networks[key.network] = NetworkVerdict(value.word)
        return Terms(PodFlags(pod.flags) & terms.FLAGS, ports, networks)

    def _policy_for(self, cookie: int, entries: Entries) -> int:
        """The number for the terms of an ADD: that of the terms in force if they are the same, otherwise the next."""
        known, pod = self._index.get(cookie), self._tables.pods.get(Cookie(cookie))
        if pod is None:
            return 0
        if known and _keys(term_rows(cookie, entries.terms, pod.policy)) == lasting(known.keys):
            return int(pod.policy if self._terms(pod, known.keys) == entries.terms else _next(pod.policy))
        return _next(pod.policy)

    def steer(self, cookie: int, netns_fd: int) -> bool:
        """Give a pod a new sk_lookup link. Returns False if the pod is not enrolled any more. Raises KernelRefused."""
        with self._instance(cookie) as instance, self.undisturbed(cookie):
            if cookie not in self._index:
                return False
            self._links.unlink(cookie)
            made = links.link_pod(self._pins, cookie, netns_fd, instance.fd)
            self._links.retain(cookie)
            return made

    def retain(self, cookie: int) -> None:
        """Keep the pod's pinned link open, which somebody else has pinned."""
        self._links.retain(cookie)

    def restore_links(self) -> list[int]:
        """Pin the links of enrolled pods again whose pins are gone; returns the pods' cookies. Raises KernelRefused."""
        return self._links.restore()

    def close(self) -> None:
        """Let go of the pods' links. Those that are pinned stay attached."""
        self._links.close()

    def listeners(self, cookie: int) -> dict[int, int]:
        """A pod's listeners for inbound connections: slot → the socket's cookie."""
        table = self._tables.listeners
        found = {slot: table.get(ListenerKey(cookie, INBOUND_PORT, slot)) for slot in range(LISTENER_SLOTS)}
        return {slot: value.quad for slot, value in found.items() if value}

    def add_listener(self, cookie: int, slot: int, listener: socket.socket) -> bool:
        """Put a listening socket of a pod's proxy into a slot.

        Returns False if the slot is taken, or if the socket listens no more. Raises KernelRefused.
        """
        try:
            # one writes a descriptor into this map, but reads the socket's cookie
            return self._tables.listeners.insert(ListenerKey(cookie, INBOUND_PORT, slot), Quad(listener.fileno()))
        except KernelRefused as error:
            if error.errno == errno.EOPNOTSUPP:  # what the kernel says of a socket that was closed meanwhile
                return False
            raise

    def drop_listener(self, cookie: int, slot: int) -> None:
        """Empty a slot of a pod."""
        self._tables.listeners.remove(ListenerKey(cookie, INBOUND_PORT, slot))

    def on_uncaptured(self, cookie: int) -> OnUncaptured:
        """What a pod asks for about what is not captured; "allow" if it is not enrolled."""
        pod = self._tables.pods.get(Cookie(cookie))
        return on_uncaptured(PodFlags(pod.flags)) if pod else "allow"

    def container(self, cookie: int) -> int:
        """The cgroup id of a strict pod's proxy container; 0 if it is not known."""
        return int((self._tables.proxies.get(Cookie(cookie)) or Quad()).quad)

    def ztunnels(self) -> frozenset[int]:
        """The cgroup ids of the node's ztunnels that the programs know."""
        return self._tables.ztunnels()

    def has_started(self, cookie: int) -> None:
        """Record that a pod's proxy has begun to take outbound connections.

        This ends the pod's early outbound, and without it no late outbound begins.
        """
        self._tables.started.put(Cookie(cookie), Word(1))

    def remove(self, cookie: int) -> bool:
        """Take a pod out. Returns False if it was not enrolled. Open connections go on; new ones are not captured."""
        with self.undisturbed(cookie):
            known = self._index.pop(cookie, None)
            if known is None:
                return False
            self._tables.pods.remove(Cookie(cookie))
            self._links.unlink(cookie)
            self._drop(known.keys)
            crowded = [record for record in records(self._tables) if record.has_entries(cookie)]
            for table in (self._tables.proxies, self._tables.started):
                table.remove(Cookie(cookie))
            for counters in self._tables.counters:
                counters.remove(Cookie(cookie))
            for record in crowded:  # last: without the counters the programs note nothing more
                record.forget_pod(cookie)
            return True

    def reclaim(self, spared: Collection[int] = ()) -> list[Identity]:
        """Remove what dead namespaces and interrupted ADDs have left. Returns the identities of the pods removed.

        A namespace without a living sk_lookup link counts as dead, unless its cookie is in `spared`.
        """
        linked = dict(links.linked_pods(self._pins))
        alive = {cookie for cookie, inode in linked.items() if inode} | set(spared)
        for other in other_layouts(self._pins):  # it steers these pods until they are taken over
            alive |= steered(other).keys()
        gone = []
        for cookie in {*linked, *self._index} - alive | self._half_written():
            with self.undisturbed(cookie):  # an ADD may have enrolled it meanwhile
                known = self._index.get(cookie)
                if known and known.identity.name and (cookie in alive or links.pod_link_alive(self._pins, cookie)):
                    continue
                if self.remove(cookie) and known and known.identity.name:
                    gone.append(known.identity)
        for cookie in linked:
            with self.undisturbed(cookie):
                # the maps decide: whoever has written the entry may not be the one that has this index
                if cookie not in self._index and (cookie not in alive or self.entry(cookie) is None):
                    links.unlink_pod(self._pins, cookie)
        return gone

    def _half_written(self) -> set[int]:
        """Pods without a name: a crash in the middle of an ADD has left them, so that ADD never succeeded."""
        return {cookie for cookie, known in list(self._index.items()) if not known.identity.name}

    def _instance(self, cookie: int) -> Descriptor:
        return Descriptor(load_instance(self._tables.descriptors(), cookie))

    def _drop(self, keys: Keys) -> None:
        for name, raw in keys:
            table = self._table(name)
            table.remove(table.key.from_buffer_copy(raw))

    def _begin_counting(self, undo: ExitStack, cookie: int) -> None:
        for table in self._tables.counters:
            if table.begin(Cookie(cookie)):
                undo.callback(table.remove, Cookie(cookie))


def _next(policy: int) -> int:
    """The number after this one. No rows have it: they are removed long before so many changes have come."""
    return (policy + 1) % _POLICIES


def _keys(of: Iterable[TableRow]) -> Keys:
    return {(row.table, bytes(row.key)) for row in of}


def _put(undo: ExitStack, table: Table[Any, Any], key: ctypes.Structure, value: ctypes.Structure) -> None:
    """Write an entry and put its undo on the stack: write the old value back, or remove the new entry."""
    before = table.get(key)
    table.put(key, value)
    if before is None:
        undo.callback(table.remove, key)
    else:
        undo.callback(table.put, key, before)
