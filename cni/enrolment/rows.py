"""One pod's entries as rows of tables. Code that writes, compares or removes rows need not know their meaning."""

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping
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
from cni.netns.sandbox import Sandbox

# The tables, besides pods, whose rows belong to one pod each. Rows in LASTING do not change with the namespace.
LASTING = ("port_rules", "networks")
TABLES = (*LASTING, "routes", "interfaces", "addresses")


class TableRow(NamedTuple):
    """A key and value of one table, and what CHECK prints if the table has no such row: made when it is asked for."""

    table: str
    key: ctypes.Structure
    value: ctypes.Structure
    meaning: Callable[[], str]


def rows_of(cookie: int, entries: Entries) -> Iterator[TableRow]:
    """All rows of a pod: first those from its annotations, then those that change with its namespace."""
    yield from port_rows(cookie, entries.port_rules)
    for network, verdict in entries.networks.items():
        meaning = partial("range {} should be {}".format, network, NetworkVerdict(verdict).name)
        yield TableRow("networks", NetworkKey.of(cookie, network), Word(verdict), meaning)
    yield from live_rows(cookie, entries.sandbox, entries.excluded_interfaces)


def port_rows(cookie: int, port_rules: Mapping[int, PortRule]) -> Iterator[TableRow]:
    """The rows for a pod's port rules. Ports are in host order."""
    for port, rule in port_rules.items():
        meaning = partial("port {} should be {!s}".format, port, PortRule(rule))
        yield TableRow("port_rules", PortKey(cookie, port), Word(rule), meaning)


def live_rows(cookie: int, sandbox: Sandbox, excluded_interfaces: Collection[str]) -> Iterator[TableRow]:
    """The rows that change with the namespace."""
    for network, way in sandbox.ways.items():
        words = "route to {} should leave through interface {} from {}"
        meaning = partial(words.format, network, way.ifindex, way.source)
        yield TableRow(
            "routes", NetworkKey.of(cookie, network), RouteEntry(way.ifindex, Address.of(way.source)), meaning
        )
    for ifindex in (sandbox.interfaces[name] for name in excluded_interfaces if name in sandbox.interfaces):
        meaning = partial("interface {} should be excluded".format, ifindex)
        yield TableRow("interfaces", InterfaceKey(cookie, ifindex), Word(1), meaning)
    for each in sandbox.addresses:
        own = OwnAddressEntry(each.ifindex, Address.of(each.source))
        meaning = partial("address {} should be registered".format, each.ip)
        yield TableRow("addresses", AddressKey.of(cookie, each.ip), own, meaning)
