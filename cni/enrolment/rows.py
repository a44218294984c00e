"""One pod's entries as rows of tables. Code that writes, compares or removes rows need not know their meaning."""

import ctypes
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

from bpf.layout import (
    Address,
    AddressKey,
    InterfaceKey,
    NetworkKey,
    NetworkVerdict,
    OwnAddressEntry,
    PortKey,
    PortRule,
    RouteEntry,
    Word,
)
from cni.enrolment.entries import Entries
from cni.enrolment.terms import Terms
from cni.netns.sandbox import Sandbox

# The tables, besides pods, whose rows belong to one pod each. Rows in LASTING are those of its terms: they carry the
# number of a policy, and do not change with the namespace.
LASTING = ("port_rules", "networks")
TABLES = (*LASTING, "routes", "interfaces", "addresses")


class TableRow(NamedTuple):
    """A key and value of one table, and what CHECK prints if the table has no such row: made when it is asked for."""

    table: str
    key: ctypes.Structure
    value: ctypes.Structure
    meaning: Callable[[], str]


def rows_of(cookie: int, entries: Entries, policy: int) -> Iterator[TableRow]:
    """All rows of a pod: first those from its annotations, then those that change with its namespace."""
    yield from term_rows(cookie, entries.terms, policy)
    yield from live_rows(cookie, entries.sandbox, entries.excluded_interfaces)


def term_rows(cookie: int, terms: Terms, policy: int) -> Iterator[TableRow]:
    """The rows for a pod's terms, under the number `policy`."""
    for port, rule in terms.port_rules.items():
        meaning = partial("port {} should be {!s}".format, port, PortRule(rule))
        yield TableRow("port_rules", PortKey(cookie, port, policy), Word(rule), meaning)
    for network, verdict in terms.networks.items():
        meaning = partial("range {} should be {}".format, network, NetworkVerdict(verdict).name)
        yield TableRow("networks", NetworkKey.of(cookie, network, policy), Word(verdict), meaning)


def live_rows(cookie: int, sandbox: Sandbox, excluded_interfaces: Collection[str]) -> Iterator[TableRow]:
    """The rows that change with the namespace."""
    for network, way in sandbox.ways.items():
        words = "route to {} should leave through interface {} from {}"
        meaning = partial(words.format, network, way.ifindex, way.source)
        if way.error:
            meaning = partial("connections to {} should fail: {}".format, network, os.strerror(way.error))
        entry = RouteEntry(way.ifindex, way.error, Address.of(way.source))
        yield TableRow("routes", NetworkKey.of(cookie, network), entry, meaning)
    for ifindex in (sandbox.interfaces[name] for name in excluded_interfaces if name in sandbox.interfaces):
        meaning = partial("interface {} should be excluded".format, ifindex)
        yield TableRow("interfaces", InterfaceKey(cookie, ifindex), Word(1), meaning)
    for each in sandbox.addresses:
        own = OwnAddressEntry(each.ifindex, Address.of(each.source))
        meaning = partial("address {} should be registered".format, each.ip)
        yield TableRow("addresses", AddressKey.of(cookie, each.ip), own, meaning)
