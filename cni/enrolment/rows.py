"""One pod's entries as rows of tables. Code that writes, compares or removes rows need not know their meaning."""

import ctypes
import os
from collections.abc import Collection, Iterator, Mapping
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
    """A key and value of one table, and the sentence that CHECK prints if the table has no such row."""

    table: str
    key: ctypes.Structure
    value: ctypes.Structure
    meaning: str


def rows_of(cookie: int, entries: Entries) -> Iterator[TableRow]:
    """All rows of a pod: first those from its annotations, then those that change with its namespace."""
    yield from port_rows(cookie, entries.port_rules)
    for network, verdict in entries.networks.items():
        meaning = f"range {network} should be {NetworkVerdict(verdict).name}"
        yield TableRow("networks", NetworkKey.of(cookie, network), Word(verdict), meaning)
    yield from live_rows(cookie, entries.sandbox, entries.excluded_interfaces)


def port_rows(cookie: int, port_rules: Mapping[int, PortRule]) -> Iterator[TableRow]:
    """The rows for a pod's port rules. Ports are in host order."""
    for port, rule in port_rules.items():
        yield TableRow("port_rules", PortKey(cookie, port), Word(rule), f"port {port} should be {PortRule(rule)!s}")


def live_rows(cookie: int, sandbox: Sandbox, excluded_interfaces: Collection[str]) -> Iterator[TableRow]:
    """The rows that change with the namespace."""
    for network, way in sandbox.ways.items():
        meaning = f"route to {network} should leave through interface {way.ifindex} from {way.source}"
        if way.error:
            meaning = f"connections to {network} should fail: {os.strerror(way.error)}"
        entry = RouteEntry(way.ifindex, way.error, Address.of(way.source))
        yield TableRow("routes", NetworkKey.of(cookie, network), entry, meaning)
    for ifindex in (sandbox.interfaces[name] for name in excluded_interfaces if name in sandbox.interfaces):
        yield TableRow("interfaces", InterfaceKey(cookie, ifindex), Word(1), f"interface {ifindex} should be excluded")
    for each in sandbox.addresses:
        own = OwnAddressEntry(each.ifindex, Address.of(each.source))
        yield TableRow("addresses", AddressKey.of(cookie, each.ip), own, f"address {each.ip} should be registered")
