"""Who talks with whom: the TCP connections of the enrolled pods, read from the sockets in their namespaces.

The maps have no entry for each flow, so that connections cost nothing while nobody looks. The sockets do not show
connections that ended without a trace, or that have no end in a namespace that could be read. The counters of sample.py
include these. Bytes are those that TCP carried: bytes redirected between sockets are not among them.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import NamedTuple

from bpf.layout import INBOUND_SOURCE6, OUTBOUND_PORT, SPREAD6, Address, PodFlags
from bpf.tables import Tables
from cni.errors import SandboxInvalid
from cni.netns.namespaces import PROC, find_netns, why_absent
from cni.netns.rtnl import IpAddress
from cni.netns.sandbox import visit
from cni.netns.sock_diag import ESTABLISHED, LISTEN, TIME_WAIT, Diag, TcpSocket
from installer.commands.sampling.sample import PodSample

# who holds an end of a connection
PROXY, APP, UNKNOWN = "proxy", "app", "?"

# 127.0.0.0/8, which includes SPREAD4 and 127.0.0.6
_LOOPBACK4 = bytes(10) + b"\xff\xff\x7f"
_SPREAD6 = SPREAD6.network_address.packed[: SPREAD6.prefixlen // 8]
_LOCAL6 = (IPv6Address("::1").packed, INBOUND_SOURCE6.packed)


class Ends(NamedTuple):
    """One connection: the client's address and port, then the server's; addresses as in the maps."""

    client: bytes
    client_port: int
    server: bytes
    server_port: int


class FlowEnd(NamedTuple):
    """An end of a flow: an enrolled pod of this node by its cookie, or else an address."""

    cookie: int | None
    ip: IpAddress | None = None


@dataclass
class SeenConnection:
    """One connection at one moment."""

    source: FlowEnd
    target: FlowEnd
    client: str = UNKNOWN  # PROXY or APP; UNKNOWN outside this node and in TIME_WAIT
    server: str = UNKNOWN
    alive: bool = False  # if not, it ended within the last minute (TIME_WAIT)
    transferred: int = 0


@dataclass
class InsideCounts:
    """Established connections inside one pod: to its proxy (outbound), from its proxy (inbound), and others."""

    outbound: int = 0
    inbound: int = 0
    other: int = 0


@dataclass
class Observation:
    """All connections at one moment; `at` is of the monotonic clock, in seconds."""

    at: float = field(default_factory=time.monotonic)
    connections: dict[Ends, SeenConnection] = field(default_factory=dict)
    inside: dict[int, InsideCounts] = field(default_factory=dict)
    accelerated: set[Ends] = field(default_factory=set)
    unseen: dict[int, str] = field(default_factory=dict)  # cookie of a pod whose sockets could not be read → why


@dataclass
class Flow:
    """The connections from one place to another."""

    source: FlowEnd
    target: FlowEnd
    ports: Counter[int] = field(default_factory=Counter)  # of the server
    ways: Counter[tuple[str, str]] = field(default_factory=Counter)  # who holds the two ends; live connections only
    alive: int = 0
    ended: int = 0  # within the last minute, as far as TIME_WAIT tells
    accelerated: int = 0  # of the live ones
    opened: float = 0.0  # each second
    rate: float = 0.0  # bytes of TCP in both directions, each second

    @property
    def way(self) -> tuple[str, str]:
        """Who holds the ends of most of the connections."""
        return self.ways.most_common(1)[0][0] if self.ways else (UNKNOWN, UNKNOWN)


class FlowWatcher:
    """Reads the sockets in pods' namespaces. It remembers the namespaces, so that the next time is cheap."""

    def __init__(self, proc: Path = PROC) -> None:
        """`proc` is a procfs of the node."""
        self._proc = proc
        self._inodes: dict[int, int] = {}

    def observe(self, tables: Tables, pods: Mapping[int, PodSample]) -> Observation:
        """All connections of these pods now. Raises OSError if it cannot look for namespaces."""
        found = Observation()
        sockets: dict[int, list[TcpSocket]] = {}
        known = self._inodes if self._inodes.keys() >= pods.keys() else None
        with find_netns(pods.keys(), set(known.values()) if known is not None else None, self._proc) as namespaces:
            for cookie, netns in namespaces:
                self._inodes[cookie] = os.fstat(netns).st_ino
                try:
                    sockets[cookie] = visit(netns, lambda _: list(_sockets()))
                except SandboxInvalid as error:
                    found.unseen[cookie] = getattr(error.__cause__, "strerror", None) or str(error)
        for cookie in pods.keys() - sockets.keys() - found.unseen.keys():
            found.unseen[cookie] = why_absent(self._proc)
        self._inodes = {cookie: inode for cookie, inode in self._inodes.items() if cookie in pods}
        found.accelerated = set(_accelerated(tables))
        _Reading(found, pods, sockets).read()
        return found


class _Reading:
    """Matches the sockets of all namespaces to connections."""

    def __init__(
        self, found: Observation, pods: Mapping[int, PodSample], sockets: Mapping[int, list[TcpSocket]]
    ) -> None:
        self._found, self._pods, self._sockets = found, pods, sockets
        self._owners = {bytes(Address.of(ip).bytes): cookie for cookie, pod in pods.items() for ip in pod.addresses}
        self._listening = {
            cookie: {each.local_port for each in those if each.state == LISTEN} for cookie, those in sockets.items()
        }

    def read(self) -> None:
        for cookie, those in self._sockets.items():
            inside = self._found.inside[cookie] = InsideCounts()
            connected = [each for each in those if each.state != LISTEN]
            here = {(each.local, each.local_port, each.remote, each.remote_port) for each in connected}
            for each in connected:
                if (each.remote, each.remote_port, each.local, each.local_port) in here:
                    self._inside(cookie, inside, each)
                elif not (_is_local(each.local) or _is_local(each.remote) or self._owners.get(each.remote) == cookie):
                    self._outside(cookie, each)  # else the last end of a connection inside the pod

    def _inside(self, cookie: int, inside: InsideCounts, each: TcpSocket) -> None:
        """Count a connection that stays inside the pod. Only its client's end is counted."""
        if each.state != ESTABLISHED or self._serves(cookie, each):
            return
        if each.remote_port == OUTBOUND_PORT and _is_local(each.remote):
            inside.outbound += 1
        elif self._role(cookie, each) == PROXY:
            inside.inbound += 1
        else:
            inside.other += 1

    def _outside(self, cookie: int, each: TcpSocket) -> None:
        own, other = FlowEnd(cookie), self._place(each.remote)
        serves = self._serves(cookie, each)
        if serves:
            ends = Ends(each.remote, each.remote_port, each.local, each.local_port)
        else:
            ends = Ends(each.local, each.local_port, each.remote, each.remote_port)
        seen = self._found.connections.get(ends)
        if seen is None:
            seen = self._found.connections[ends] = SeenConnection(*((other, own) if serves else (own, other)))
        if each.state != ESTABLISHED:
            return
        seen.alive = True
        seen.transferred = max(seen.transferred, each.transferred)  # both ends may be read, one later than the other
        if serves:
            seen.server = self._role(cookie, each)
        else:
            seen.client = self._role(cookie, each)

    def _place(self, raw: bytes) -> FlowEnd:
        cookie = self._owners.get(raw)
        return FlowEnd(None, Address.from_buffer_copy(raw).ip()) if cookie is None else FlowEnd(cookie)

    def _serves(self, cookie: int, each: TcpSocket) -> bool:
        """Whether the local end is the server's. Listeners are not enough: a proxy serves any port without one."""
        if each.has_dialled is not None:
            return not each.has_dialled
        if each.local_port in self._listening[cookie]:
            return True
        other = self._owners.get(each.remote)
        if other is not None and each.remote_port in self._listening.get(other, ()):
            return False
        return each.local_port < each.remote_port  # a client's ephemeral port is mostly the higher one

    def _role(self, cookie: int, each: TcpSocket) -> str:
        pod = self._pods[cookie]
        # in TPROXY mode the proxy runs as root, for transparent sockets; the kernel does not tell a socket's group
        proxies = (pod.proxy_uid, 0) if PodFlags.TPROXY in pod.flags else (pod.proxy_uid,)
        return PROXY if each.uid in proxies else APP


def flows_between(before: Observation, after: Observation) -> list[Flow]:
    """The connections of `after` by source and target, busiest first, with rates since `before`."""
    seconds = after.at - before.at
    flows: dict[tuple[FlowEnd, FlowEnd], Flow] = {}
    for ends, seen in after.connections.items():
        flow = flows.setdefault((seen.source, seen.target), Flow(seen.source, seen.target))
        flow.ports[ends.server_port] += 1
        if seen.alive:
            flow.alive += 1
            flow.ways[seen.client, seen.server] += 1
            flow.accelerated += ends in after.accelerated
        else:
            flow.ended += 1
        earlier = before.connections.get(ends)
        if seconds > 0:
            flow.opened += (earlier is None) / seconds
            flow.rate += max(0, seen.transferred - (earlier.transferred if earlier else 0)) / seconds
    return sorted(flows.values(), key=lambda flow: (-flow.rate, -flow.opened, -flow.alive, -flow.ended))


def _sockets() -> Iterator[TcpSocket]:
    with Diag() as diag:
        yield from diag.sockets(ESTABLISHED, TIME_WAIT, LISTEN)


def _accelerated(tables: Tables) -> Iterator[Ends]:
    for key in tables.accelerated.every_key():
        it = key.connection
        yield Ends(bytes(it.client.bytes), it.client_port, bytes(it.server.bytes), it.server_port)


def _is_local(raw: bytes) -> bool:
    """Whether it is loopback, an address for captured connections, or one that proxies dial applications from."""
    return raw.startswith((_LOOPBACK4, _SPREAD6)) or raw in _LOCAL6
