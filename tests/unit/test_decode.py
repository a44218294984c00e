"""Every structure of the maps as named plain values."""

import ctypes
import json
import socket
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from bpf.layout import (
    TABLES,
    TOTALS,
    Address,
    AddressKey,
    Connection,
    ConnectionKey,
    Cookie,
    DestinationEntry,
    EndKey,
    MeetingEntry,
    NetworkKey,
    NodeEntry,
    OwnAddressEntry,
    PodEntry,
    PodFlags,
    Quad,
    TallyEntry,
    Word,
)
from installer.commands.maps.decode import cookies, decoded, is_about_pods

ALPHA, BETA = Address.of(ip_address("10.0.0.1")), Address.of(ip_address("fd00::2"))
NAMES = {7: "default/alpha"}


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_plain(table: str) -> None:
    key, value = (kind() for kind in TABLES[table])
    if isinstance(key, NetworkKey):
        key = NetworkKey.of(7, ip_network("0.0.0.0/0"))
    entry = decoded(table, key, value, NAMES)
    assert json.loads(json.dumps(entry)) == entry
    assert set(entry) == {"key", "value"}


@pytest.mark.parametrize("table", TABLES)
def test_every_cookie_is_found(table: str) -> None:
    kinds = TABLES[table]
    full = [kind.from_buffer_copy(b"\x01" * ctypes.sizeof(kind)) for kind in kinds]
    assert is_about_pods(*kinds) == any(cookies(each) for each in full)
    assert {cookie for each in full for cookie in cookies(each)} <= {0x0101010101010101}
    of_node = (
        "node",
        "ztunnels",
        "kubelet",
        "totals",
        "passages",
        "flow_totals",
        "lifetimes",
        "lost",
        "build",
        "steering",
        "inbound",
    )
    assert is_about_pods(*kinds) == (table not in of_node)


@pytest.mark.parametrize("network", ["0.0.0.0/0", "10.1.0.0/16", "10.1.2.3/32", "::/0", "fd00::/8", "fd00::1/128"])
def test_networks_lose_what_the_trie_needs(network: str) -> None:
    key = NetworkKey.of(7, ip_network(network))
    told = decoded("networks", key, Word(2), NAMES)
    assert told == {
        "key": {"pod": "default/alpha", "cookie": 7, "network": network, "policy": 0},
        "value": {"verdict": "included"},
    }


def test_ports_in_network_order_are_turned() -> None:
    wire = int.from_bytes((443).to_bytes(2, "big"), "little")
    key = ConnectionKey(8, ALPHA, BETA, 40000, 15001)
    told = decoded("handshakes", key, DestinationEntry(BETA, wire, socket.AF_INET6), NAMES)
    assert told["value"] == {"address": "fd00::2", "port": 443, "family": "IPv6"}
    assert told["key"] == {
        "pod": None,
        "cookie": 8,
        "client": "10.0.0.1",
        "server": "fd00::2",
        "client_port": 40000,
        "server_port": 15001,
    }


def test_structures_in_structures_are_told() -> None:
    connection = Connection(ALPHA, BETA, 1, 2, 3, 4)
    told = decoded("accelerated", EndKey(7, connection, 1), Quad(99), NAMES)
    assert told["key"]["connection"]["client"] == "10.0.0.1"
    assert told["key"]["side"] == "server"
    assert told["value"] == {"socket_cookie": 99}
    meeting = decoded("meetings", connection, MeetingEntry(7, 0xFFFF8000, 0, 2), NAMES)["value"]
    expected: dict[str, Any] = {"pod": "default/alpha", "cookie": 7, "client": "0xffff8000", "server": "0x0"}
    assert meeting == expected | {"level": "full", "captured": 0}


def test_what_this_version_does_not_know_is_told_as_a_number() -> None:
    pod = PodEntry(flags=PodFlags.IPV6 | 1 << 30, acceleration=9)
    value = decoded("pods", Cookie(7), pod, NAMES)["value"]
    assert (value["flags"], value["acceleration"]) == (["ipv6", "0x40000000"], 9)
    assert decoded("totals", Word(77), Quad(1), NAMES) == {"key": {"connections": 77}, "value": {"count": 1}}


def test_no_source_is_none_and_text_that_is_none_is_survived() -> None:
    entry = decoded("addresses", AddressKey(7, ALPHA), OwnAddressEntry(2), NAMES)
    assert entry["key"] == {"pod": "default/alpha", "cookie": 7, "address": "10.0.0.1"}
    assert entry["value"] == {"ifindex": 2, "source": None}
    assert decoded("node", Word(0), NodeEntry(1, 2, b"\xff"), NAMES)["value"]["reason"] == "\ufffd"


def test_counters_have_names() -> None:
    counts = decoded("tallies", Cookie(7), TallyEntry((ctypes.c_uint64 * len(TOTALS))(*range(len(TOTALS)))), NAMES)[
        "value"
    ]["connections"]
    assert counts["outbound_direct"] == 0
    assert counts["inbound_refused"] == 8
