"""The node's counters at one moment, and the rates between two moments.

They are read from the pins alone, so no agent has to run. `sidestep report` and `sidestep top` both show them.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from bpf.acceleration import NodeLevel, level_of
from bpf.attachment import is_attached
from bpf.layout import (
    INBOUND_PORT,
    LISTENER_SLOTS,
    TOTALS,
    Cookie,
    Level,
    ListenerKey,
    PodEntry,
    PodFlags,
    TallyEntry,
    TrafficEntry,
)
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.enrolment.steered import Steering, steering_of
from cni.enrolment.strays import PodProcesses, processes_of
from cni.netns.rtnl import IpAddress
from installer.commands.pods.enrolled_pods import EnrolledPod, every
from installer.commands.pods.namespace import looks_into
from installer.commands.pods.pod_state import state_of
from installer.commands.pods.proxy_state import Proxy, ProxyState, proxy_state

Name = TypeVar("Name")

# direction and verdict, as in layout.TOTALS
Kind = tuple[str, str]
# fields of struct traffic: messages on accelerated connections, redirected or passed to TCP, and redirected bytes
REDIRECTED, BYTES = "redirected", "redirected_bytes"
PASSED = ("undrained", "over_budget", "no_peer")
# verdicts of connections that failed
_FAILED = ("refused", "denied")


@dataclass(frozen=True)
class Counts:
    """Counts of one pod or of all: totals since the maps were made, or rates per second between two samples."""

    connections: Mapping[Kind, float]
    messages: Mapping[str, float]

    def of(self, direction: str, verdict: str) -> float:
        """Connections of one kind; 0 for a kind that is not counted."""
        return self.connections.get((direction, verdict), 0)

    @property
    def refused(self) -> float:
        """Connections that failed, in all directions."""
        return sum(count for kind, count in self.connections.items() if is_failure(kind))

    @property
    def captured(self) -> float:
        """Connections, and datagrams to nameservers, that went to the proxy."""
        return sum(count for (_, verdict), count in self.connections.items() if verdict == "captured")

    @property
    def direct(self) -> float:
        """Connections that the policy lets pass."""
        return sum(count for (_, verdict), count in self.connections.items() if verdict == "direct")

    @property
    def passed(self) -> float:
        """Messages on accelerated connections that still took TCP's path."""
        return sum(self.messages.get(cause, 0) for cause in PASSED)

    @property
    def share(self) -> float | None:
        """The share of messages on accelerated connections that skipped TCP's path, 0 to 1. None without messages."""
        redirected = self.messages.get(REDIRECTED, 0)
        return redirected / (redirected + self.passed) if redirected + self.passed else None


@dataclass(frozen=True)
class PodSample:
    """One enrolled pod."""

    cookie: int
    identity: Identity
    addresses: tuple[IpAddress, ...]
    flags: PodFlags
    proxy_uid: int
    level: Level  # the lower of the pod's own and the node's
    listening: bool  # whether the maps have a socket of its proxy for inbound connections
    counts: Counts
    steering: Steering = Steering.STEERED
    processes: PodProcesses = field(default_factory=PodProcesses)
    proxy: ProxyState = field(default_factory=lambda: ProxyState(Proxy.LISTENS, ""))

    @property
    def state(self) -> str:
        """The state in a word or two, as every command has it."""
        return state_of(self.flags, self.steering, self.processes, self.proxy)


@dataclass(frozen=True)
class Sample:
    """The node at one moment; `at` is of the monotonic clock, in seconds."""

    at: float
    attached: bool
    level: NodeLevel
    pods: Mapping[int, PodSample]
    total: Counts


@dataclass(frozen=True)
class Fill:
    """How full a map is."""

    name: str
    entries: int
    limit: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.entries / self.limit if self.limit else 0.0


@dataclass(frozen=True)
class Rates:
    """What happened per second between two samples. Pods are those of the second sample."""

    seconds: float
    pods: Mapping[int, Counts]
    total: Counts


def is_failure(kind: Kind) -> bool:
    """Whether connections of this kind failed."""
    return kind[1] in _FAILED


def take_sample(pins: Pins, tables: Tables, proc: Path) -> Sample:
    """Read the counters now. `proc` is a procfs of the node."""
    level = level_of(tables)
    addresses: dict[int, list[IpAddress]] = {}
    for key in tables.addresses.every_key():
        addresses.setdefault(key.cookie, []).append(key.address.ip())
    entered = {key.cookie: pod for key, pod in tables.pods.every()}
    steering = steering_of(pins, tables, entered, proc)
    processes = processes_of(pins, entered, proc)
    pods = {
        cookie: replace(
            _pod(tables, Cookie(cookie), pod, level.level, addresses.get(cookie, ())),
            steering=steering[cookie],
            processes=processes[cookie],
        )
        for cookie, pod in entered.items()
    }
    for pod, inside in looks_into(_deaf(pins, tables, pods), proc):
        pods[pod.cookie] = replace(pods[pod.cookie], proxy=proxy_state(pod, inside))
    total = Counts(tables.connection_totals(), _summed(pod.counts.messages for pod in pods.values()))
    return Sample(time.monotonic(), is_attached(pins), level, pods, total)


def _deaf(pins: Pins, tables: Tables, pods: Mapping[int, PodSample]) -> list[EnrolledPod]:
    """The pods whose proxy does not listen, as far as the programs know."""
    if all(pod.listening for pod in pods.values()):
        return []
    return [pod for pod in every(pins, tables) if pod.cookie in pods and not pod.inbound_listeners]


def _pod(tables: Tables, key: Cookie, pod: PodEntry, node: Level, addresses: Iterable[IpAddress]) -> PodSample:
    tally = tables.tallies.get(key) or TallyEntry()
    traffic = tables.traffic.get(key) or TrafficEntry()
    ordered = sorted(addresses, key=lambda ip: (ip.is_link_local, ip.version, ip.packed))
    return PodSample(
        key.cookie,
        Identity.of(pod),
        tuple(ordered),
        PodFlags(pod.flags),
        pod.proxy_uid,
        min(Level(pod.acceleration), node),
        _listens(tables, key.cookie),
        Counts(
            dict(zip(TOTALS, tally.connections, strict=True)),
            {name: getattr(traffic, name) for name, *_ in TrafficEntry._fields_},
        ),
    )


def _listens(tables: Tables, cookie: int) -> bool:
    slots = range(LISTENER_SLOTS)  # slots are filled from 0, but closed sockets leave gaps
    return any(tables.listeners.get(ListenerKey(cookie, INBOUND_PORT, slot)) is not None for slot in slots)


def fills_of(tables: Tables) -> list[Fill]:
    """How full each map is. This walks over all keys, which is too slow for every second."""
    return [Fill(name, table.count(), table.limit) for name, table in tables.named().items()]


def rates_between(before: Sample, after: Sample) -> Rates:
    """The differences of the counters, per second.

    A counter that is lower than before has started again from 0. A new counter has started from 0 too.
    """
    seconds = after.at - before.at
    none = Counts({}, {})
    pods = {}
    for cookie, pod in after.pods.items():
        earlier = before.pods.get(cookie)
        pods[cookie] = _rate(earlier.counts if earlier else none, pod.counts, seconds)
    connections = _per_second(before.total.connections, after.total.connections, seconds)
    # the total of messages lost the share of pods that have gone since: add up the rates of the present pods instead
    return Rates(seconds, pods, Counts(connections, _summed(each.messages for each in pods.values())))


def _rate(before: Counts, after: Counts, seconds: float) -> Counts:
    return Counts(
        _per_second(before.connections, after.connections, seconds),
        _per_second(before.messages, after.messages, seconds),
    )


def _per_second(before: Mapping[Name, float], after: Mapping[Name, float], seconds: float) -> dict[Name, float]:
    found = {}
    for name, count in after.items():
        earlier = before.get(name, 0)
        more = count - earlier if count >= earlier else count
        found[name] = more / seconds if seconds > 0 else 0.0
    return found


def _summed(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {name: 0 for name, *_ in TrafficEntry._fields_}
    for counts in each:
        for name, count in counts.items():
            total[name] += count
    return total
