"""Turns entries of maps into plain values with names: readable, in host order, without padding.

The structures of bpf/layout.py give the names of the fields. The tables below give the meaning of numbers, one line
each.
"""

import ctypes
import hashlib
import socket
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any

from bpf.layout import (
    LIFETIMES,
    PASSAGES,
    RULES,
    TOTALS,
    Address,
    BuildEntry,
    CoverageEntry,
    DestinationEntry,
    EndKey,
    FindingKey,
    FlowKey,
    FlowWay,
    Level,
    MeetingEntry,
    NetworkKey,
    NetworkVerdict,
    NodeEntry,
    PodEntry,
    PodFlags,
    PortRule,
    Quad,
    ShadowEntry,
    ShadowKey,
    ShadowSumsEntry,
    SteeringEntry,
    TallyEntry,
    UncapturedEntry,
    UncapturedKey,
    Uncompared,
    Way,
    Word,
    ZtunnelsEntry,
)

Plain = dict[str, Any]
Names = Mapping[int, str]  # cookie → NAMESPACE/NAME
Structure = ctypes.Structure

# enum side of maps.h
_SIDES = ("client", "server")
_DIRECTIONS = ("outbound", "inbound")
_FAMILIES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_OUTCOMES = tuple(f"{direction}_{verdict}" for direction, verdict in TOTALS)
_PASSED = tuple(f"{direction}_{what}" for direction, what in PASSAGES)


def _member(kind: type[IntEnum]) -> Callable[[int], str | int]:
    """A function that names a value of an enum. A value that this version does not know stays a number."""
    names = {each.value: each.name.lower() for each in kind}
    return lambda value: names.get(value, value)


def _flags(kind: type[IntFlag]) -> Callable[[int], list[str]]:
    """A function that names the bits that are set. Bits that this version does not know become one number."""

    def named(value: int) -> list[str]:
        known = [each for each in kind if value & each]
        rest = value & ~sum(known)
        return [str(each.name).lower() for each in known] + ([hex(rest)] if rest else [])

    return named


def _rule(number: int) -> str | int:
    """The name of a rule."""
    return RULES[number] if number < len(RULES) else number


# (structure, field) → what makes its number readable
_FIELDS: dict[tuple[type[Structure], str], Callable[[Any], Any]] = {
    (PodEntry, "flags"): _flags(PodFlags),
    (PodEntry, "acceleration"): _member(Level),
    (NodeEntry, "acceleration"): _member(Level),
    (NodeEntry, "wanted"): _member(Level),
    (MeetingEntry, "level"): _member(Level),
    (MeetingEntry, "client"): hex,
    (MeetingEntry, "server"): hex,
    (EndKey, "side"): lambda side: _SIDES[side] if side < len(_SIDES) else side,
    (DestinationEntry, "family"): lambda family: _FAMILIES.get(family, family),
    (BuildEntry, "sources"): lambda raw: bytes(raw).hex(),
    (SteeringEntry, "name"): lambda names: [each.value.decode() for each in names if each.value],
    (SteeringEntry, "code"): lambda code: f"sha256 {hashlib.sha256(bytes(code)).hexdigest()}",
    (TallyEntry, "connections"): lambda counts: dict(zip(_OUTCOMES, counts, strict=True)),
    (CoverageEntry, "passages"): lambda counts: dict(zip(_PASSED, counts, strict=True)),
    (UncapturedKey, "way"): _member(Way),
    (ZtunnelsEntry, "cgroup"): lambda ids: [each for each in ids if each],
    (FlowKey, "way"): _member(FlowWay),
    (ShadowKey, "way"): _member(Way),
    (FindingKey, "way"): _member(Way),
    (ShadowEntry, "rule"): _rule,
    (FindingKey, "rule"): _rule,
    (ShadowSumsEntry, "not_compared"): lambda counts: {
        each.name.lower(): count for each, count in zip(Uncompared, counts, strict=True)
    },
    (UncapturedEntry, "rule"): _rule,
}
# table → name of its plain key or value, and what makes it readable; a key or value without a name is left out
_KEYS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "totals": ("connections", lambda index: _OUTCOMES[index] if index < len(_OUTCOMES) else index),
    "passages": ("what", lambda index: _PASSED[index] if index < len(_PASSED) else index),
    "flow_totals": ("direction", lambda index: _DIRECTIONS[index] if index < len(_DIRECTIONS) else index),
    "lifetimes": ("up_to_seconds", lambda index: LIFETIMES[index] if index < len(LIFETIMES) else None),
    "node": ("", int),
    "ztunnels": ("", int),
    "kubelet": ("", int),
    "tracing": ("", int),
    "lost": ("", int),
    "build": ("", int),
    "steering": ("", int),
    "inbound": ("", int),
}
_VALUES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "port_rules": ("rules", _flags(PortRule)),
    "networks": ("verdict", _member(NetworkVerdict)),
    "interfaces": ("", int),
    "started": ("", int),
    "dials": ("", int),
    "proxies": ("cgroup_id", int),
    "listeners": ("socket_cookie", int),
    "accelerated": ("socket_cookie", int),
    "totals": ("count", int),
    "passages": ("count", int),
    "forgotten": ("entries", int),
    "flows_forgotten": ("entries", int),
    "lifetimes": ("connections", int),
    "lost": ("events", int),
    "inbound": ("program_id", int),
    "lost_handovers": ("connections", int),
}


def decoded(table: str, key: Structure, value: Structure, names: Names) -> dict[str, Plain]:
    """An entry as {"key": …, "value": …}."""
    told = {"key": _side(_KEYS.get(table), key, names), "value": _side(_VALUES.get(table), value, names)}
    if table == "routes":
        del told["key"]["policy"]  # the key of networks, but routes are of no policy
    return told


def cookies(structure: Structure) -> set[int]:
    """The cookies of the pods that a key or value is about."""
    found = set()
    for path in _paths(type(structure)):
        each: Any = structure
        for step in path:
            each = getattr(each, step)
        found.add(int(each))
    return found


def is_about_pods(*kinds: type[Structure]) -> bool:
    """Whether keys or values of these types have a pod's cookie."""
    return any(_paths(kind) for kind in kinds)


@cache
def _paths(kind: type[Structure]) -> tuple[tuple[str, ...], ...]:
    """The fields of a structure that are cookies, each as the path of field names that leads there."""
    found: list[tuple[str, ...]] = []
    for name, inner, *_ in kind._fields_:
        if name == "cookie":
            found.append((name,))
        elif isinstance(inner, type) and issubclass(inner, ctypes.Structure):
            found += [(name, *rest) for rest in _paths(inner)]
    return tuple(found)


def _side(meaning: tuple[str, Callable[[int], Any]] | None, structure: Structure, names: Names) -> Plain:
    if isinstance(structure, Word | Quad) and meaning is not None:
        name, told = meaning
        number = structure.word if isinstance(structure, Word) else structure.quad
        return {name: told(number)} if name else {}
    if isinstance(structure, Address):
        return {"address": _address("", structure)}
    return _fields(structure, names)


def _fields(structure: Structure, names: Names) -> Plain:
    if isinstance(structure, NetworkKey):
        return _cookie(structure.cookie, names) | {"network": str(structure.network), "policy": structure.policy}
    plain: Plain = {}
    for name, *_ in structure._fields_:
        value = getattr(structure, name)
        if name == "cookie":
            plain |= _cookie(value, names)
        elif not name.startswith("zero"):
            plain |= _field(structure, name, value, names)
    return plain


def _field(structure: Structure, name: str, value: Any, names: Names) -> Plain:
    if told := _FIELDS.get((type(structure), name)):
        return {name: told(value)}
    if name.endswith("_be"):
        return {name.removesuffix("_be"): _from_network(value, getattr(type(structure), name).size)}
    if isinstance(value, Address):
        return {name: _address(name, value)}
    if isinstance(value, ctypes.Structure):
        return {name: _fields(value, names)}
    if isinstance(value, bytes):
        return {name: value.decode(errors="replace")}
    if isinstance(value, ctypes.Array):
        return {name: [_fields(each, names) if isinstance(each, ctypes.Structure) else each for each in value]}
    return {name: value}


def _cookie(value: int, names: Names) -> Plain:
    """A pod's name and cookie. The name is None if the pod is not enrolled."""
    return {"pod": names.get(value), "cookie": value}


def _address(name: str, value: Address) -> str | None:
    """The address as text. A source that is all zero means no address."""
    return None if name.startswith("source") and not any(value.bytes) else str(value.ip())


def _from_network(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, sys.byteorder), "big")
