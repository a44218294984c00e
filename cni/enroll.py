"""The one place that writes pods into the kernel: entries and the sk_lookup link go in, or come back out.

All or nothing: every step of an enrolment leaves its undoing on a stack, and the pod's own entry, without which the
programs see no pod, is written last and removed first. The maps are the state; what is kept here beside them is an
index by pod that is read back from them at start.
"""

import ctypes
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from ipaddress import IPv4Network, IPv6Network
from typing import Any, NamedTuple

from bpf import attachment, links
from bpf.errors import SidestepError
from bpf.layout import (
    Address,
    Cookie,
    NetworkKey,
    NetworkVerdict,
    Owner,
    PodFlags,
    PortKey,
    PortRule,
    Word,
)
from bpf.pins import Pins
from bpf.tables import Table, Tables
from cni.entries import Entries, Identity
from cni.errors import RegistrationFailed


class _Keys(NamedTuple):
    """What one pod has in the tables, and whose it is."""

    identity: Identity
    addresses: set[bytes]
    ports: set[bytes]
    networks: set[bytes]


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
        tables = self._tables
        with self._lock, ExitStack() as undo:
            before = self._index.get(cookie)
            wanted = _keys_of(cookie, entries)
            try:
                pod = entries.pod()
                for port, rule in entries.port_rules.items():
                    _put(undo, tables.port_rules, PortKey(cookie, port), Word(rule))
                for network, verdict in entries.networks.items():
                    _put(undo, tables.networks, NetworkKey.of(cookie, network), Word(verdict))
                if links.link_pod(self._pins, cookie, netns_fd):
                    undo.callback(links.unlink_pod, self._pins, cookie)
                for ip, ifindex in entries.addresses.items():
                    self._claim(Address.of(ip), cookie)
                    _put(undo, tables.addresses, Address.of(ip), Owner(cookie, ifindex))
                _put(undo, tables.pods, Cookie(cookie), pod)
            except SidestepError as error:
                if isinstance(error, RegistrationFailed):
                    raise
                raise RegistrationFailed(f"{entries.identity} could not be enrolled: {error}") from error
            undo.pop_all()
            self._index[cookie] = wanted
            if before:
                self._drop(before, keep=wanted)

    def remove(self, cookie: int) -> bool:
        """Take a pod out; False when it was not in. Its open connections go on, new ones are not captured."""
        with self._lock:
            known = self._index.pop(cookie, None)
            if known is None:
                return False
            self._tables.pods.remove(Cookie(cookie))
            links.unlink_pod(self._pins, cookie)
            self._drop(known, keep=None)
            return True

    def of_attachment(self, container_id: str, ifname: str) -> list[int]:
        """The cookies enrolled by one container and interface: what a DEL may remove, with or without a namespace."""
        with self._lock:
            return [
                cookie
                for cookie, known in self._index.items()
                if (known.identity.container_id, known.identity.ifname) == (container_id, ifname)
            ]

    def of_network(self, network: str) -> dict[int, Identity]:
        """Everything enrolled through one CNI network, by cookie: what a GC looks through."""
        with self._lock:
            return {
                cookie: known.identity for cookie, known in self._index.items() if known.identity.network == network
            }

    def differences(self, cookie: int, entries: Entries) -> list[str]:
        """How the maps differ from what the pod should have; a sentence each, empty when they agree."""
        tables = self._tables
        found = []
        if not links.pod_link_alive(self._pins, cookie):
            found.append("the namespace has no inbound steering (sk_lookup) link")
        pod = tables.pods.get(Cookie(cookie))
        if pod is None:
            return [*found, f"no entry in pods for {entries.identity} (netns cookie {cookie})"]
        if bytes(pod) != bytes(entries.pod()):
            found.append(
                f"entry of {entries.identity} is {Identity.of(pod)} with flags {PodFlags(pod.flags)!s}, "
                f"should have flags {entries.flags!s}, or differs in proxy ids, sources or counts"
            )
        for port, rule in entries.port_rules.items():
            stored = tables.port_rules.get(PortKey(cookie, port))
            if stored is None or stored.word != rule:
                found.append(f"port {port} should be {PortRule(rule)!s}")
        for network, verdict in entries.networks.items():
            stored = tables.networks.get(NetworkKey.of(cookie, network))
            if stored is None or stored.word != verdict:
                found.append(f"range {network} should be {NetworkVerdict(verdict).name}")
        for ip in entries.addresses:
            owner = tables.addresses.get(Address.of(ip))
            if owner is None or owner.cookie != cookie:
                found.append(f"address {ip} is not registered for this pod")
        return found

    def reclaim(self) -> list[Identity]:
        """Remove what dead namespaces and interrupted ADDs have left; returns whose it was, where that is known."""
        with self._lock:
            alive = {cookie for cookie, live in links.linked_pods(self._pins) if live}
            # without a container id it is what a crash in the middle of an ADD has left, which never succeeded
            dead = [key for key, known in self._index.items() if key not in alive or not known.identity.container_id]
            gone = [self._index[key].identity for key in dead if self._index[key].identity.container_id]
            for cookie in dead:
                self.remove(cookie)
            for cookie, live in list(links.linked_pods(self._pins)):
                if not live or cookie not in self._index:
                    links.unlink_pod(self._pins, cookie)
            return gone

    def is_attached(self) -> bool:
        """Whether all programs are pinned and their global links attached."""
        return attachment.is_attached(self._pins)

    def __len__(self) -> int:
        with self._lock:
            return len(self._index)

    def _claim(self, address: Address, cookie: int) -> None:
        """Make sure no other live pod has the address: inbound steering finds pods by it."""
        owner = self._tables.addresses.get(address)
        if owner is None or owner.cookie == cookie:
            return
        if links.pod_link_alive(self._pins, owner.cookie):
            other = self._index.get(owner.cookie)
            raise RegistrationFailed(
                f"address {address.ip()} belongs to {other.identity if other else 'another pod'} on this node; "
                "two running mesh pods cannot share one"
            )
        self.remove(owner.cookie)

    def _drop(self, known: _Keys, keep: _Keys | None) -> None:
        """Delete a pod's keys but those of `keep`."""
        tables = self._tables
        none: set[bytes] = set()
        for raw in known.addresses - (keep.addresses if keep else none):
            tables.addresses.remove(Address.from_buffer_copy(raw))
        for raw in known.ports - (keep.ports if keep else none):
            tables.port_rules.remove(PortKey.from_buffer_copy(raw))
        for raw in known.networks - (keep.networks if keep else none):
            tables.networks.remove(NetworkKey.from_buffer_copy(raw))

    def _read_back(self) -> dict[int, _Keys]:
        """The index as the maps have it, half-written pods of a crash included (their name is then unknown)."""
        tables = self._tables
        index: dict[int, _Keys] = {}

        def keys_of(cookie: int) -> _Keys:
            return index.setdefault(cookie, _Keys(Identity("", "", "", "", "", ""), set(), set(), set()))

        for key, pod in tables.pods.every():
            index[key.cookie] = _Keys(Identity.of(pod), set(), set(), set())
        for address, owner in tables.addresses.every():
            keys_of(owner.cookie).addresses.add(bytes(address))
        for port_key in tables.port_rules.every_key():
            keys_of(port_key.cookie).ports.add(bytes(port_key))
        for network_key in tables.networks.every_key():
            keys_of(network_key.cookie).networks.add(bytes(network_key))
        return index


def _keys_of(cookie: int, entries: Entries) -> _Keys:
    return _Keys(
        entries.identity,
        {bytes(Address.of(ip)) for ip in entries.addresses},
        {bytes(PortKey(cookie, port)) for port in entries.port_rules},
        {bytes(key) for key in _network_keys(cookie, entries.networks)},
    )


def _network_keys(cookie: int, networks: Iterable[IPv4Network | IPv6Network]) -> Iterable[NetworkKey]:
    return (NetworkKey.of(cookie, network) for network in networks)


def _put(undo: ExitStack, table: Table[Any, Any], key: ctypes.Structure, value: ctypes.Structure) -> None:
    """Write an entry and leave its undoing: the old value back, or the entry out again."""
    before = table.get(key)
    table.put(key, value)
    if before is None:
        undo.callback(table.remove, key)
    else:
        undo.callback(table.put, key, before)
