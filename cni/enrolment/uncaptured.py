"""What pods have sent and got past their proxies, as the programs note it (uncaptured.c): read, bounded, forgotten.

The maps are the only record. This module keeps them small: of a pod that nears its limit the oldest entries go.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from itertools import groupby

from bpf.layout import PASSAGES, RULES, UNCAPTURED_PER_POD, Cookie, CoverageEntry, Quad, UncapturedKey, Way
from bpf.tables import Tables

# of UNCAPTURED_PER_POD: where the oldest entries begin to go, and how many are left then
_MANY, _KEPT = UNCAPTURED_PER_POD * 3 // 4, UNCAPTURED_PER_POD // 2
# OUTCOME_* of maps.h; datagrams of the proxy's own have another
_PASSED, _REFUSED = 0, 1
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


def listed(tables: Tables) -> dict[int, list[Uncaptured]]:
    """Every entry, by the pod's netns cookie; the latest comes first."""
    found: dict[int, list[Uncaptured]] = {}
    # both clocks at one moment: the kernel's does not count the time that a machine sleeps
    since = datetime.now(UTC) - timedelta(microseconds=time.monotonic_ns() / 1000)
    for key, value in tables.uncaptured.every():
        if key.outcome not in (_PASSED, _REFUSED):
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
    gone = (tables.forgotten.get(Cookie(cookie)) or Quad()).quad
    return Sums(dict(zip(PASSAGES, entry.passages, strict=True)), gone, entry.dropped)


def forget_oldest(tables: Tables) -> int:
    """Make room where a pod has many entries; returns how many have gone. Entries of pods that have gone go too.

    Only one process of a node may call it.
    """
    crowded = {key.cookie for key, entry in tables.coverage.every() if _entries(tables, key, entry) > _MANY}
    if not crowded:
        return 0
    enrolled = {key.cookie for key in tables.coverage.every_key()}
    ages = [(key.cookie, value.last, bytes(key)) for key, value in tables.uncaptured.every()]
    gone = 0
    for cookie, some in groupby(sorted(ages, reverse=True), key=lambda each: each[0]):
        if cookie in crowded:
            gone += _remove(tables, cookie, [key for _, _, key in some][_KEPT:])
        elif cookie not in enrolled:
            gone += sum(tables.uncaptured.remove(UncapturedKey.from_buffer_copy(key)) for _, _, key in some)
    return gone


def forget_pod(tables: Tables, cookie: int) -> None:
    """Remove all entries of a pod that is being taken out. The sums go with the pod's other counters."""
    entry = tables.coverage.get(Cookie(cookie))
    if entry is None or not _entries(tables, Cookie(cookie), entry):
        return
    for key in _keys_of(tables, cookie):
        tables.uncaptured.remove(key)


def _keys_of(tables: Tables, cookie: int) -> Iterator[UncapturedKey]:
    return (key for key in list(tables.uncaptured.every_key()) if key.cookie == cookie)


def _entries(tables: Tables, key: Cookie, entry: CoverageEntry) -> int:
    """How many entries a pod has, by its own counts."""
    return int(entry.added) - int((tables.forgotten.get(key) or Quad()).quad)


def _remove(tables: Tables, cookie: int, keys: list[bytes]) -> int:
    removed = sum(tables.uncaptured.remove(UncapturedKey.from_buffer_copy(key)) for key in keys)
    before = (tables.forgotten.get(Cookie(cookie)) or Quad()).quad
    if removed and tables.coverage.get(Cookie(cookie)):
        tables.forgotten.put(Cookie(cookie), Quad(before + removed))
    return removed
