"""What pods have sent and got past their proxies, as the programs note it (uncaptured.c). records.py keeps it small."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address

from bpf.layout import PASSAGES, RULES, Cookie, Way
from bpf.tables import Tables
from cni.enrolment.records import uncaptured_record
from cni.netns.proc_net import endpoint

_REFUSED = 1  # OUTCOME_REFUSED of maps.h
# IPPROTO_*: what people call them
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp", 136: "udplite"}


@dataclass(frozen=True)
class Uncaptured:
    """One remote end, and what went there or came from there past the proxy, or was refused.

    `port` is in host order: of the remote end, or the pod's own if `way` is Way.IN. Without an address and a port it is
    a socket that was opened, whose packets no hook sees. The process is the first that did so; a packet has none.
    """

    way: Way
    address: IPv4Address | IPv6Address | None
    port: int
    protocol: str
    is_refused: bool
    rule: str
    count: int
    first: datetime
    last: datetime
    pid: int
    uid: int  # as the initial user namespace sees it
    command: str

    @property
    def peer(self) -> str:
        """The other end, as people are told it."""
        if self.address is None:
            return "socket opened"
        if self.way is Way.IN:
            return f"from {self.address} to port {self.port}"
        return endpoint(self.address, self.port)


@dataclass(frozen=True)
class Sums:
    """A pod's sums. They have also what is not listed any more."""

    passages: dict[tuple[str, str], int]  # by PASSAGES
    forgotten: int  # entries that had to go because the pod had too many
    dropped: int  # that found no room for an entry

    @property
    def past(self) -> int:
        """Connections and datagrams past the proxy, and sockets that no hook sees."""
        return sum(count for (_, what), count in self.passages.items() if what != "refused")

    @property
    def refused(self) -> int:
        """Connections, datagrams and sockets that were refused."""
        return sum(count for (_, what), count in self.passages.items() if what == "refused")


def listed(tables: Tables, only: Collection[int] | None = None) -> dict[int, list[Uncaptured]]:
    """The entries by the pod's netns cookie; the latest comes first.

    Without `only`, a collection of cookies, of all pods.
    """
    found: dict[int, list[Uncaptured]] = {}
    # both clocks at one moment: the kernel's does not count the time that a machine sleeps
    since = datetime.now(UTC) - timedelta(microseconds=time.monotonic_ns() / 1000)
    for key, value in tables.uncaptured.every():
        if only is not None and key.cookie not in only:
            continue
        way = Way(key.way)
        each = Uncaptured(
            way=way,
            address=None if way is Way.SOCKET else key.remote.ip(),
            port=key.port,
            protocol=_PROTOCOLS.get(key.protocol, str(key.protocol)),
            is_refused=key.outcome == _REFUSED,
            rule=RULES[value.rule] if value.rule < len(RULES) else "",
            count=value.count,
            first=since + timedelta(microseconds=value.first / 1000),
            last=since + timedelta(microseconds=value.last / 1000),
            pid=value.pid,
            uid=value.uid,
            command=value.command.decode(errors="replace"),
        )
        found.setdefault(key.cookie, []).append(each)
    return {cookie: sorted(some, key=lambda each: each.last, reverse=True) for cookie, some in found.items()}


def sums_of(tables: Tables, cookie: int) -> Sums | None:
    """A pod's sums, None if it is not enrolled."""
    entry = tables.coverage.get(Cookie(cookie))
    if entry is None:
        return None
    passages = dict(zip(PASSAGES, entry.passages, strict=True))
    return Sums(passages, uncaptured_record(tables).forgotten_of(cookie), entry.dropped)
