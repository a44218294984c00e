"""One pod's entries as rows of the tables, so that writing, comparing and removing them need not know what they say."""

import ctypes
from collections.abc import Iterator
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
from cni.enrolment.entries import Entries, Surroundings

# the tables with rows of single pods, beside pods itself
LASTING = ("port_rules", "networks")
TABLES = (*LASTING, "routes", "interfaces", "addresses")


class TableRow(NamedTuple):
    """A key and value of one table, and what they say in words."""

    table: str
    key: ctypes.Structure
    value: ctypes.Structure
    meaning: str


def lasting_rows(cookie: int, entries: Entries) -> Iterator[TableRow]:
    """What the annotations say: it stays as it is for the pod's life."""
    for port, rule in entries.port_rules.items():
        meaning = f"port {port} should be {PortRule(rule)!s}"
        yield TableRow("port_rules", PortKey(cookie, port), Word(rule), meaning)
    for network, verdict in entries.networks.items():
        meaning = f"range {network} should be {NetworkVerdict(verdict).name}"
        yield TableRow("networks", NetworkKey.of(cookie, network), Word(verdict), meaning)


def live_rows(cookie: int, surroundings: Surroundings) -> Iterator[TableRow]:
    """What the namespace looks like: it changes with it."""
    for network, way in surroundings.ways.items():
        meaning = f"route to {network} should leave through interface {way.ifindex} from {way.source}"
        yield TableRow(
            "routes", NetworkKey.of(cookie, network), RouteEntry(way.ifindex, Address.of(way.source)), meaning
        )
    for ifindex in surroundings.excluded:
        yield TableRow("interfaces", InterfaceKey(cookie, ifindex), Word(1), f"interface {ifindex} should be excluded")
    for each in surroundings.addresses:
        own = OwnAddressEntry(each.ifindex, Address.of(each.source))
        yield TableRow("addresses", AddressKey.of(cookie, each.ip), own, f"address {each.ip} should be registered")
