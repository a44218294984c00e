"""Compares what the programs decide for shadow pods with what netfilter did to the same connections.

The programs record each connection (bpf/shadow.c). conntrack says where its packets went. Sums and differences are kept
in maps that only the agent writes, so they outlive an agent.
"""

import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import structlog

from bpf.errors import TableFull
from bpf.layout import (
    INBOUND_PORT,
    OUTBOUND_PORT,
    RULES,
    Address,
    AddressKey,
    Cookie,
    FindingEntry,
    FindingKey,
    InterfaceKey,
    PodEntry,
    PodFlags,
    PortKey,
    PortRule,
    ShadowCountsEntry,
    ShadowEntry,
    ShadowKey,
    ShadowSumsEntry,
    Uncompared,
    Way,
)
from bpf.tables import Tables
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity
from cni.errors import SandboxInvalid
from cni.netns.conntrack import Conntrack, Ends, Tracked
from cni.netns.namespaces import find_netns
from cni.netns.sandbox import visit
from cni.policy.annotations import CapturePolicy
from cni.policy.decision import Inbound, inbound

log = structlog.get_logger("shadow")

ENDED = 0  # the cookie of all pods that have ended, in shadow_sums and findings
RESOLVER_PORT = 15053
# enum verdict of policy.h, in its order
VERDICTS = ("pass", "proxy-outbound", "proxy-inbound", "dns", "refuse", "unreachable")
# where such a connection goes: a port of the proxy's, 0 for its own destination, None if it is refused
_GOES_TO = (0, OUTBOUND_PORT, INBOUND_PORT, RESOLVER_PORT, None, None)
_PASS, _INBOUND = 0, 2
# a record is made before conntrack has an entry: nanoseconds that the packet has
_RIPE = 500_000_000
# conntrack zones of Istio's rules for DNS capture: of the proxy's queries, and of others; see docs/semantics.md
_PROXYS, _OTHERS = (1, 0, 2), (2, 0, 1)
# records that are compared in one look: the others wait for the next
_AT_ONCE = 10_000

IpAddress = IPv4Address | IPv6Address
Record = tuple[ShadowKey, ShadowEntry]


@dataclass(frozen=True)
class Compared:
    """One connection. `went_to` is the port that netfilter redirected it to, 0 if it did not.

    `remote` and `port` are the destination before any redirection if `way` is Way.OUT. For Way.IN they are the client's
    address and the pod's port.
    """

    way: Way
    protocol: int
    remote: IpAddress
    port: int
    verdict: int
    rule: int
    went_to: int = 0
    uncompared: Uncompared | None = None

    @property
    def is_same(self) -> bool:
        """Whether netfilter did what the programs would have done."""
        if self.way is Way.IN and self.port == INBOUND_PORT:  # it ends there, redirected or not
            return self.verdict in (_PASS, _INBOUND)
        return _GOES_TO[self.verdict] == self.went_to if self.verdict < len(_GOES_TO) else False


def described(verdict: int, rule: int) -> str:
    """A verdict and its rule, as people are told them."""
    name = VERDICTS[verdict] if verdict < len(VERDICTS) else str(verdict)
    return f"{name} ({RULES[rule]})" if 0 < rule < len(RULES) else name


def netfilters(went_to: int) -> str:
    """What netfilter did, as people are told it."""
    return f"redirected to {went_to}" if went_to else "not redirected"


@dataclass
class Shadows:
    """The comparisons of one node; one thread calls look()."""

    tables: Tables
    enrolments: Enrolments
    proc: Path = Path("/proc")
    _problems: set[str] = field(default_factory=set)

    def look(self) -> dict[int, list[Compared]]:
        """Compare what has been recorded; returns each pod's first differences, by netns cookie."""
        entries = self._shadow_pods()
        self._begin(entries)
        ripe = self._ripe()
        first: dict[int, list[Compared]] = {}
        late = [record for cookie, some in ripe.items() if cookie not in entries for record in some]
        if late:  # their pods have ended meanwhile
            self._add(ENDED, [(_unseen(key, value, Uncompared.UNSEEN), value) for key, value in late])
        for cookie, compared in self._compared(entries, ripe):
            if news := self._add(cookie, compared):
                first[cookie] = news
        self._count(entries)
        self._forget(entries)
        return first

    def _shadow_pods(self) -> dict[int, PodEntry]:
        found = {}
        for cookie in self.enrolments.cookies():
            entry = self.tables.pods.get(Cookie(cookie))
            if entry is not None and PodFlags(entry.flags) & PodFlags.SHADOW:
                found[cookie] = entry
        return found

    def _begin(self, cookies: Iterable[int]) -> None:
        for cookie in cookies:
            if self.tables.shadow_counts.begin(Cookie(cookie)):
                self.tables.shadow_sums.insert(Cookie(cookie), ShadowSumsEntry(since=time.monotonic_ns()))

    def _ripe(self) -> dict[int, list[Record]]:
        """The records that are old enough, by cookie. They are removed."""
        until, found = time.monotonic_ns() - _RIPE, dict[int, list[Record]]()
        some = [(key, value) for key, value in self.tables.shadows.every() if value.time < until][:_AT_ONCE]
        for key, value in some:
            self.tables.shadows.remove(key)
            found.setdefault(key.cookie, []).append((key, value))
        return found

    def _compared(
        self, entries: Mapping[int, PodEntry], ripe: Mapping[int, list[Record]]
    ) -> Iterator[tuple[int, list[tuple[Compared, ShadowEntry]]]]:
        """Each pod's comparisons."""
        left = {cookie for cookie in ripe if cookie in entries}
        inodes = self.enrolments.inodes(left) if left else {}
        with find_netns(left, set(inodes.values()) if len(inodes) == len(left) else None, self.proc) as found:
            for cookie, netns in found:
                left.discard(cookie)
                yield cookie, self._compared_of(cookie, entries[cookie], netns, ripe[cookie])
        for cookie in left:
            yield cookie, [(_unseen(key, value, Uncompared.UNSEEN), value) for key, value in ripe[cookie]]

    def _compared_of(
        self, cookie: int, entry: PodEntry, netns: int, some: list[Record]
    ) -> list[tuple[Compared, ShadowEntry]]:
        def ask() -> list[tuple[Compared, ShadowEntry]]:
            with Conntrack() as conntrack:
                return [(self._compare(cookie, entry, key, value, conntrack), value) for key, value in some]

        try:
            return visit(netns, lambda _: ask())
        except SandboxInvalid as error:
            self._mention(f"{Identity.of(entry)}: {error.__cause__ or error}")
            return [(_unseen(key, value, Uncompared.UNSEEN), value) for key, value in some]

    def _mention(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.add(problem)
            log.warning("shadow.unseen", problem=problem)

    def _compare(
        self, cookie: int, entry: PodEntry, key: ShadowKey, value: ShadowEntry, conntrack: Conntrack
    ) -> Compared:
        ends = Ends(key.client.ip(), key.client_port, key.server.ip(), key.server_port)
        way, flags = Way(key.way), PodFlags(entry.flags)
        if way is Way.IN and PodFlags.TPROXY in flags:
            if value.verdict == _PASS and key.server_port != INBOUND_PORT:
                return _unseen(key, value, None)  # it has arrived where it was sent
            return _unseen(key, value, Uncompared.TPROXY)
        zones: tuple[int, ...] = (0,)
        if key.protocol == socket.IPPROTO_UDP:
            zones = _PROXYS if value.uid == entry.proxy_uid else _OTHERS
        tracked = _find(conntrack, way, key.protocol, ends, zones)
        if tracked is None:
            return _unseen(key, value, Uncompared.NO_ENTRY)
        if way is Way.OUT:
            return _outbound(key, value, tracked)
        return self._inbound(cookie, entry, tracked)

    def _inbound(self, cookie: int, entry: PodEntry, tracked: Tracked) -> Compared:
        """Decides again, by the port that the packet was for before netfilter redirected it."""
        ends, flags = tracked.original, PodFlags(entry.flags)
        port = ends.destination_port
        row = self.tables.port_rules.get(PortKey(cookie, port, entry.policy))
        rules = PortRule(row.word) if row else PortRule(0)
        own = self.tables.addresses.get(AddressKey.of(cookie, ends.destination))
        is_excluded = own and self.tables.interfaces.get(InterfaceKey(cookie, own.ifindex))
        policy = CapturePolicy(
            mode="TPROXY" if PodFlags.TPROXY in flags else "REDIRECT",
            inbound_all=PodFlags.INBOUND_ALL in flags,
            include_inbound_ports=frozenset([port] if PortRule.INCLUDE_INBOUND in rules else []),
            exclude_inbound_ports=frozenset([port] if PortRule.EXCLUDE_INBOUND in rules else []),
            exclude_interfaces=("excluded",) if is_excluded else (),
        )
        is_ipv6_captured = PodFlags.IPV6 in flags
        interface = "excluded" if is_excluded else None
        verdict = inbound(policy, Inbound(port, ends.source, interface=interface, is_ipv6_captured=is_ipv6_captured))
        rule = "I5" if verdict.rule == "I2" else verdict.rule  # the programs do not tell these apart
        went_to = tracked.reply.source_port if tracked.is_redirected else 0
        number = RULES.index(rule) if rule in RULES else 0
        return Compared(Way.IN, socket.IPPROTO_TCP, ends.source, port, VERDICTS.index(verdict.action), number, went_to)

    def _add(self, cookie: int, compared: list[tuple[Compared, ShadowEntry]]) -> list[Compared]:
        """Add to a pod's sums and differences. Returns the differences if it had none before."""
        sums = self.tables.shadow_sums.get(Cookie(cookie)) or ShadowSumsEntry(since=time.monotonic_ns())
        had_any, different = bool(sums.different), []
        for each, record in compared:
            sums.last = max(sums.last, record.time)
            if each.uncompared is not None:
                sums.not_compared[each.uncompared] += 1
            elif each.is_same:
                sums.same += 1
            else:
                sums.different += 1
                different.append(each)
                self._find(cookie, each, record)
        self.tables.shadow_sums.put(Cookie(cookie), sums)
        return [] if had_any else different

    def _find(self, cookie: int, each: Compared, record: ShadowEntry) -> None:
        key = FindingKey(
            cookie=cookie,
            remote=Address.of(each.remote),
            port=each.port,
            protocol=each.protocol,
            way=each.way,
            verdict=each.verdict,
            rule=each.rule,
            went_to=each.went_to,
        )
        first = FindingEntry(first=record.time, pid=record.pid, uid=record.uid, command=record.command)
        self._add_finding(key, first, 1, record.time)

    def _add_finding(self, key: FindingKey, first: FindingEntry, count: int, last: int) -> None:
        entry = self.tables.findings.get(key) or first
        entry.count, entry.last = entry.count + count, max(entry.last, last)
        try:
            self.tables.findings.put(key, entry)
        except TableFull as error:
            self._mention(f"{error}; further kinds of differences are only counted")

    def _count(self, cookies: Iterable[int]) -> None:
        """What the programs alone count."""
        for cookie in cookies:
            counts = self.tables.shadow_counts.get(Cookie(cookie)) or ShadowCountsEntry()
            sums = self.tables.shadow_sums.get(Cookie(cookie))
            counted = (counts.unnamed, counts.dropped)
            if sums and counted != tuple(sums.not_compared[Uncompared.UNNAMED :]):
                sums.not_compared[Uncompared.UNNAMED], sums.not_compared[Uncompared.DROPPED] = counted
                self.tables.shadow_sums.put(Cookie(cookie), sums)

    def _forget(self, shadow_pods: Mapping[int, PodEntry]) -> None:
        """Add what is known of pods that are shadows no more to the sums of all that have ended."""
        for key in list(self.tables.shadow_counts.every_key()):
            if key.cookie not in shadow_pods:
                self.tables.shadow_counts.remove(key)
        gone = {key.cookie for key in self.tables.shadow_sums.every_key()} - {ENDED, *shadow_pods}
        if not gone:
            return
        for finding, value in list(self.tables.findings.every()):
            if finding.cookie in gone:
                self.tables.findings.remove(finding)
                finding.cookie = ENDED
                count, value.count = value.count, 0
                self._add_finding(finding, value, count, value.last)
        for cookie in gone:
            sums = self.tables.shadow_sums.get(Cookie(cookie)) or ShadowSumsEntry()
            ended = self.tables.shadow_sums.get(Cookie(ENDED)) or ShadowSumsEntry(since=sums.since)
            ended.since = min(ended.since, sums.since)
            ended.last = max(ended.last, sums.last)
            ended.same += sums.same
            ended.different += sums.different
            for reason in Uncompared:
                ended.not_compared[reason] += sums.not_compared[reason]
            self.tables.shadow_sums.put(Cookie(ENDED), ended)
            self.tables.shadow_sums.remove(Cookie(cookie))


def _find(conntrack: Conntrack, way: Way, protocol: int, ends: Ends, zones: tuple[int, ...]) -> Tracked | None:
    """The entry of a connection. What has arrived is found by what its replies have, as it was redirected already.

    If that finds nothing, it is a packet that conntrack takes for invalid, and has not redirected.
    """
    if way is Way.OUT:
        return conntrack.find(protocol, ends, zones)
    replies = Ends(ends.destination, ends.destination_port, ends.source, ends.source_port)
    return conntrack.find(protocol, replies, zones) or conntrack.find(protocol, ends, zones)


def _unseen(key: ShadowKey, value: ShadowEntry, why: Uncompared | None) -> Compared:
    way = Way(key.way)
    remote = key.server.ip() if way is Way.OUT else key.client.ip()
    return Compared(way, key.protocol, remote, key.server_port, value.verdict, value.rule, 0, why)


def _outbound(key: ShadowKey, value: ShadowEntry, tracked: Tracked) -> Compared:
    went_to = tracked.reply.source_port if tracked.is_redirected else 0
    return Compared(Way.OUT, key.protocol, key.server.ip(), key.server_port, value.verdict, value.rule, went_to)
