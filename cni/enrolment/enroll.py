"""The one place that writes pods into the kernel and removes them: their map entries and their sk_lookup link.

An enrolment succeeds as a whole or changes nothing: each step puts its undo on a stack. The pod's own entry is written
last and removed first, because the programs ignore a pod without it.
"""

import ctypes
import errno
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from bpf import links
from bpf.errors import KernelRefused, SidestepError
from bpf.layout import (
    INBOUND_PORT,
    LISTENER_SLOTS,
    Address,
    Cookie,
    ListenerKey,
    PodFlags,
    PortKey,
    PortRule,
    Quad,
    Word,
)
from bpf.layouts import other_layouts, steered
from bpf.pins import Pins
from bpf.steering import load_instance
from bpf.syscalls import Descriptor
from bpf.tables import Table, Tables
from cni.enrolment import rows
from cni.enrolment.enrolled import Enrolled, Keys, Known
from cni.enrolment.entries import Entries, Identity, with_denied
from cni.enrolment.records import records
from cni.enrolment.rows import TableRow, live_rows, port_rows, rows_of
from cni.errors import RegistrationFailed
from cni.netns.sandbox import Sandbox


class Enrolments(Enrolled):
    """Enrols, changes and removes the pods of this node. Safe to use from many threads."""

    def __init__(self, pins: Pins, tables: Tables) -> None:
        super().__init__(pins, tables)
        self._links = links.RetainedLinks(pins)
        for cookie in self._index:
            self._links.retain(cookie)
        for cookie in self._index:  # a pod that an earlier version of sidestep enrolled may have no counters
            self._begin_counting(ExitStack(), cookie)

    def add(self, cookie: int, entries: Entries, netns_fd: int) -> None:
        """Enrol a pod, or bring its enrolment up to date. `netns_fd` is a descriptor of its network namespace.

        Raises RegistrationFailed that names the table or link in the way; the maps are then as before.
        """
        wanted = list(rows_of(cookie, entries))
        try:
            with self._instance(cookie) as instance, self.undisturbed(cookie), ExitStack() as undo:
                self._begin_counting(undo, cookie)
                if links.link_pod(self._pins, cookie, netns_fd, instance.fd):
                    undo.callback(links.unlink_pod, self._pins, cookie)
                for row in wanted:
                    _put(undo, self._table(row.table), row.key, row.value)
                _put(undo, self._tables.pods, Cookie(cookie), entries.pod())
                undo.pop_all()
                before, self._index[cookie] = self._index.get(cookie), Known(entries.identity, _keys(wanted))
                self._links.retain(cookie)
                if before:
                    self._drop(before.keys - self._index[cookie].keys)
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
            live = list(live_rows(cookie, sandbox, excluded_interfaces))
            gone = {key for key in known.keys if key[0] not in rows.LASTING} - _keys(live)
            known.keys.update(_keys(live))
            for row in live:
                self._table(row.table).put(row.key, row.value)
            self._drop(gone)
            known.keys.difference_update(gone)
            pod.source4, pod.source6 = Address.of(sandbox.source(4)), Address.of(sandbox.source(6))
            for flag, wanted in ((PodFlags.ROUTES, sandbox.ways), (PodFlags.LOOPBACK_STAYS, sandbox.loopback_stays)):
                pod.flags = pod.flags | flag if wanted else pod.flags & ~flag
            self._tables.pods.put(Cookie(cookie), pod)

    def deny(self, cookie: int, denied: Mapping[int, PortRule]) -> bool:
        """Replace the ports that a pod denies by `denied` (by port, host order). Returns whether anything changed.

        Does nothing if the pod is not enrolled any more. Raises TableFull; the pod then denies the old ports.
        """
        with self.undisturbed(cookie), ExitStack() as undo:
            known, pod = self._index.get(cookie), self._tables.pods.get(Cookie(cookie))
            if known is None or pod is None:
                return False
            before, flags = self._port_rules(known.keys), PodFlags(pod.flags)
            after = with_denied(before, denied)
            for flag, wanted in ((PodFlags.PORT_RULES, after), (PodFlags.DENIES, denied)):
                flags = flags | flag if wanted else flags & ~flag
            if (after, flags) == (before, pod.flags):
                return False
            ports = list(port_rows(cookie, after))
            for row in ports:
                _put(undo, self._table(row.table), row.key, row.value)
            pod.flags, pod.port_rules = flags, len(after)
            self._tables.pods.put(Cookie(cookie), pod)
            undo.pop_all()
            gone = {key for key in known.keys if key[0] == "port_rules"} - _keys(ports)
            known.keys.update(_keys(ports))
            self._drop(gone)
            known.keys.difference_update(gone)
            return True

    def _port_rules(self, keys: Keys) -> dict[int, PortRule]:
        """The pod's rules in the table port_rules, by port."""
        found = {}
        for name, raw in keys:
            if name == "port_rules":
                key = PortKey.from_buffer_copy(raw)
                rule = self._tables.port_rules.get(key)
                if rule is not None:
                    found[key.port] = PortRule(rule.word)
        return found

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

    def container(self, cookie: int) -> int:
        """The cgroup id of a strict pod's proxy container; 0 if it is not known."""
        return int((self._tables.proxies.get(Cookie(cookie)) or Quad()).quad)

    def has_started(self, cookie: int) -> None:
        """Record that a pod's proxy has begun to take outbound connections. This ends the pod's early outbound."""
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
            for record in records(self._tables):
                record.forget_pod(cookie)
            for table in (self._tables.proxies, self._tables.started):
                table.remove(Cookie(cookie))
            for counters in self._tables.counters:
                counters.remove(Cookie(cookie))
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
