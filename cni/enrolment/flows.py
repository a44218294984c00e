"""With whom pods' connections are and were, and what they carry: closed ones from the maps, open ones from the kernel.

The programs add a connection to its pod's sums when it closes (flows.c). Until then TCP counts, and what the programs
have stored with the socket says where it will be added. So a connection is in one of the two places at any time. The
maps are read first: a connection that closes meanwhile is missing, but none is there twice.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from bpf.layout import Cookie, Counted, FlowEntry, FlowKey, FlowSumsEntry, FlowWay
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.enrolment.records import flow_record
from cni.errors import SandboxInvalid
from cni.netns.namespaces import NoProcfs, find_netns, why_absent
from cni.netns.sandbox import visit
from cni.netns.sock_diag import CONNECTED, Diag, TcpSocket

Place = tuple[FlowWay, bytes, int]  # way, address as in the maps, port


@dataclass
class Carried:
    """What some connections have carried. Bytes are those of applications, `retransmits` are segments."""

    open: int = 0
    closed: int = 0
    sent: int = 0  # bytes that the other end has acknowledged
    received: int = 0  # bytes
    retransmits: int = 0
    last_closed: datetime | None = None
    _rtts: int = 0  # µs, of so many connections:
    _timed: int = 0
    _nanoseconds: int = 0  # that they were open, or have been until now

    @property
    def connections(self) -> int:
        """Closed ones and open ones."""
        return self.open + self.closed

    @property
    def rtt(self) -> float | None:
        """The smoothed round trip time in seconds, on average of the connections that have one; None if none has."""
        return self._rtts / self._timed / 1e6 if self._timed else None

    @property
    def duration(self) -> float | None:
        """Seconds from established to closed, or until now, on average; None without a connection."""
        return self._nanoseconds / self.connections / 1e9 if self.connections else None

    def add_closed(self, entry: FlowEntry, booted: datetime) -> None:
        """Add an entry of the maps. `booted` is when CLOCK_MONOTONIC was 0."""
        self.closed += entry.connections
        self.sent += entry.sent
        self.received += entry.received
        self.retransmits += entry.retransmits
        self._rtts += entry.rtt
        self._timed += entry.timed
        self._nanoseconds += entry.duration
        if entry.connections:
            self.last_closed = booted + timedelta(microseconds=entry.last / 1000)

    def add_open(self, each: TcpSocket, since: int, now: int) -> None:
        """Add a socket that is open. Times are CLOCK_MONOTONIC in ns."""
        self.open += 1
        self.sent += each.sent
        self.received += each.received
        self.retransmits += each.retransmits
        self._rtts += each.rtt
        self._timed += each.rtt > 0
        self._nanoseconds += max(0, now - since)


@dataclass
class Flow:
    """The connections to one destination: of captured ones the original. Of inbound ones `port` is the pod's own."""

    way: FlowWay
    address: IPv4Address | IPv6Address | None
    port: int
    carried: Carried = field(default_factory=Carried)


@dataclass
class PodFlows:
    """The connections of one pod. `outbound` and `inbound` have those too whose entries were forgotten or dropped."""

    flows: list[Flow]
    outbound: Carried
    inbound: Carried
    forgotten: int  # entries that had to go because the pod had too many
    dropped: int  # connections that found no room for an entry
    unseen: str = ""  # why the open connections are not known


def flows_of(pins: Pins, tables: Tables, cookies: Collection[int], proc: Path) -> dict[int, PodFlows]:
    """The connections of these pods, those with the most bytes first. Pods that have gone are left out.

    `proc` is a procfs of the node. Raises NotAttached, KernelRefused.
    """
    booted = datetime.now(UTC) - timedelta(microseconds=time.monotonic_ns() / 1000)
    sums = {cookie: whole for cookie in cookies if (whole := tables.flow_sums.get(Cookie(cookie)))}
    listed: dict[int, dict[Place, Flow]] = {cookie: {} for cookie in sums}
    for key, entry in tables.flows.every():
        if key.cookie in listed:
            _flow_at(listed[key.cookie], key).carried.add_closed(entry, booted)
    found = {cookie: _begun(tables, cookie, whole, booted) for cookie, whole in sums.items()}
    for cookie, sockets in _open_sockets(pins, sums.keys(), proc):
        if isinstance(sockets, str):
            found[cookie].unseen = sockets
        else:
            _add_open(found[cookie], listed[cookie], cookie, sockets)
    for cookie, pod in found.items():
        pod.flows = sorted(listed[cookie].values(), key=lambda each: -(each.carried.sent + each.carried.received))
    return found


def _begun(tables: Tables, cookie: int, entry: FlowSumsEntry, booted: datetime) -> PodFlows:
    pod = PodFlows([], Carried(), Carried(), flow_record(tables).forgotten_of(cookie), entry.dropped)
    pod.outbound.add_closed(entry.outbound, booted)
    pod.inbound.add_closed(entry.inbound, booted)
    return pod


def _flow_at(flows: dict[Place, Flow], key: FlowKey) -> Flow:
    way = FlowWay(key.way)
    address = None if way is FlowWay.INBOUND else key.remote.ip()
    return flows.setdefault((way, bytes(key.remote.bytes), key.port), Flow(way, address, key.port))


def _add_open(pod: PodFlows, flows: dict[Place, Flow], cookie: int, sockets: list[TcpSocket]) -> None:
    now = time.monotonic_ns()
    for each in sockets:
        counted = Counted.from_buffer_copy(each.stored)
        if not counted.since or counted.key.cookie != cookie:
            continue
        direction = pod.inbound if counted.key.way == FlowWay.INBOUND else pod.outbound
        for carried in (_flow_at(flows, counted.key).carried, direction):
            carried.add_open(each, counted.since, now)


def _open_sockets(pins: Pins, cookies: Collection[int], proc: Path) -> Iterator[tuple[int, list[TcpSocket] | str]]:
    """The sockets of each pod that the programs have stored something with, or why they can't be read."""
    left, why = set(cookies), ""
    with Descriptor(pins.open_map("counted")) as stored:
        try:
            with find_netns(left, proc=proc) as namespaces:
                for cookie, netns in namespaces:
                    left.discard(cookie)
                    try:
                        yield cookie, visit(netns, lambda _: list(_sockets(stored.fd)))
                    except SandboxInvalid as error:
                        yield cookie, getattr(error.__cause__, "strerror", None) or str(error)
        except (OSError, NoProcfs) as error:
            why = str(error)
    for cookie in left:
        yield cookie, why or why_absent(proc)


def _sockets(storage: int) -> Iterator[TcpSocket]:
    with Diag() as diag:
        yield from (each for each in diag.sockets(*CONNECTED, storage=storage) if each.stored)
