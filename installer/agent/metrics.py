"""The agent's Prometheus metrics, named as Istio names them where Istio has the metric, else sidestep_….

docs/metrics.md explains each metric. A scrape reads the kernel's counters. The other parts of the agent count
everything else: they call the observe methods of Metrics.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from bpf.acceleration import level_of
from bpf.compiler import sources_digest
from bpf.layout import LIFETIMES, TrafficEntry
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.enroll import Enrolments
from cni.enrolment.steered import steering_of
from cni.enrolment.strays import processes_of
from cni.errors import Code
from cni.verbs import RESULTS
from installer.host.install import SUCCESS

# seconds between two counts of map entries, however often scrapes come: counting means walking all maps
_COUNT_SECONDS = 10.0
# seconds: a plugin call may take 10, most take milliseconds
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# codes of malformed requests: Istio's agent answers such requests with HTTP status 400
_BAD_REQUEST = {
    Code.INCOMPATIBLE_VERSION,
    Code.UNSUPPORTED_FIELD,
    Code.INVALID_ENVIRONMENT,
    Code.DECODE_FAILURE,
    Code.INVALID_CONFIG,
}


class Metrics:
    """All metrics of the agent, in a registry of their own."""

    def __init__(self, pins: Pins, tables: Tables, enrolments: Enrolments, proc: Path) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(_KernelCollector(pins, tables, enrolments, proc))
        self._installs = Counter("istio_cni_installs", "Installations of the plugin", ["result"], registry=registry)
        self._has_installed = False
        self._ready = Gauge("istio_cni_install_ready", "Whether the plugin is installed", registry=registry)
        self._repairs = Counter(
            "istio_cni_repair_pods_repaired", "Broken pods acted on", ["type", "result"], registry=registry
        )
        self._reconciled = Counter(
            "nodeagent_reconcile_events", "Things put right by reconciliation", ["type"], registry=registry
        )
        self._plugin_requests = Counter(
            "istio_cni_plugin_requests",
            "ADD requests by the outcome's HTTP status",
            ["response_code"],
            registry=registry,
        )
        self._enrolments = Counter(
            "sidestep_enrolments", "ADD requests, by what became of the pod", ["result"], registry=registry
        )
        for result in RESULTS:  # start at 0, so that a first failure shows as an increase
            self._enrolments.labels(result)
        self._requests = Counter(
            "sidestep_cni_requests", "CNI requests by command and outcome", ["command", "code"], registry=registry
        )
        self._seconds = Histogram(
            "sidestep_cni_request_duration_seconds",
            "Seconds that the agent took for a CNI request",
            ["command"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._api = Counter(
            "sidestep_api_requests", "Requests to the API server", ["verb", "status"], registry=registry
        )

    def follow_ambient(self, states: Callable[[], Mapping[str, int]], connected: Callable[[], int]) -> None:
        """Have the pods in ambient mode counted at each scrape, by state, and the ztunnels that are connected."""
        self.registry.register(_AmbientCollector(states, connected))

    def answers(self) -> type[MetricsHandler]:
        """HTTP handler that serves the metrics in the format that the client asks for."""
        return MetricsHandler.factory(self.registry)

    def observe_request(self, command: str, code: int, seconds: float) -> None:
        """Count an answered CNI request: its command ("" if unknown), its result code (0: success), seconds taken."""
        self._requests.labels(command or "unknown", _code_name(code)).inc()
        self._seconds.labels(command or "unknown").observe(seconds)
        if command == "ADD":
            self._plugin_requests.labels(str(int(_http_status(code)))).inc()

    def observe_enrolment(self, result: str) -> None:
        """Count an ADD by its result, one of RESULTS."""
        self._enrolments.labels(result).inc()

    def observe_install(self, result: str) -> None:
        """Count an installation of the plugin: SUCCESS or the failure (installer/host/install.py)."""
        self._installs.labels(result).inc()
        self._has_installed = self._has_installed or result == SUCCESS

    def set_install_ready(self, ok: bool) -> None:
        """Set whether the plugin is in place.

        If a starting agent finds the plugin in place, that counts as one installation: Istio's agent installs at each
        start.
        """
        if ok and not self._has_installed:
            self.observe_install(SUCCESS)
        self._ready.set(ok)

    def observe_repair(self, kind: str, result: str) -> None:
        """Count a broken pod by what was done about it (repair, delete, label) and the result."""
        self._repairs.labels(kind, result).inc()

    def observe_reconcile(self, kind: str, count: int) -> None:
        """Count things that reconciliation put right, by kind."""
        self._reconciled.labels(kind).inc(count)

    def observe_api_request(self, verb: str, status: int) -> None:
        """Count a request to the API server, by verb and HTTP status (0: no answer)."""
        self._api.labels(verb, str(status or "none")).inc()


class _AmbientCollector(Collector):
    """Asks the members of ambient mode at each scrape."""

    def __init__(self, states: Callable[[], Mapping[str, int]], connected: Callable[[], int]) -> None:
        self._states, self._connected = states, connected

    def collect(self) -> Iterator[Metric]:
        """The metrics of one scrape."""
        yield GaugeMetricFamily("ztunnel_connected", "Connections of ztunnels", value=self._connected())
        pods = GaugeMetricFamily("sidestep_ambient_pods", "Captured pods in ambient mode, by state", labels=["state"])
        for state, count in self._states().items():
            pods.add_metric([state], count)
        yield pods


class _KernelCollector(Collector):
    """Reads the maps at each scrape."""

    def __init__(self, pins: Pins, tables: Tables, enrolments: Enrolments, proc: Path) -> None:
        self._pins, self._tables, self._enrolments, self._proc = pins, tables, enrolments, proc
        self._counted = -_COUNT_SECONDS
        self._entries: dict[str, tuple[int, int]] = {}
        self._traffic: dict[int, TrafficEntry] = {}
        self._ended: list[TrafficEntry] = []
        self._lost: dict[int, int] = {}
        self._lost_before = 0

    def collect(self) -> Iterator[Metric]:
        """The metrics of one scrape."""
        yield GaugeMetricFamily("sidestep_pods", "Enrolled pods", value=len(self._enrolments))
        states = steering_of(self._pins, self._tables, self._captured(), self._proc)
        yield GaugeMetricFamily(
            "sidestep_pods_not_steered",
            "Enrolled pods whose inbound connections reach the application, or may do so",
            value=sum(state.is_open for state in states.values()),
        )
        yield from self._strays()
        attached = self._enrolments.is_attached()
        yield GaugeMetricFamily("sidestep_attached", "Whether all programs and links are in place", value=attached)
        build = GaugeMetricFamily("sidestep_build_info", "Digest of the programs' sources", labels=["programs"])
        build.add_metric([sources_digest().hex()[:12]], 1)
        yield build
        yield from self._maps()
        yield from self._connections()
        yield from self._uncaptured()
        yield from self._shadows()
        yield from self._flows()
        yield from self._lost_handovers()
        yield from self._acceleration()

    def _captured(self) -> set[int]:
        """The enrolled pods without the shadow pods, which Istio's rules capture."""
        return set(self._enrolments.cookies()) - set(self._enrolments.shadows())

    def _strays(self) -> Iterator[Metric]:
        processes = processes_of(self._pins, self._captured(), self._proc).values()
        yield GaugeMetricFamily(
            "sidestep_stray_processes",
            "Processes of enrolled pods whose outbound connections are not captured, because no program sees them",
            value=sum(len(each.strays) for each in processes),
        )
        yield GaugeMetricFamily(
            "sidestep_pods_processes_unknown",
            "Enrolled pods of which it is not known whether they have stray processes",
            value=sum(bool(each.unknown) for each in processes),
        )

    def _maps(self) -> Iterator[Metric]:
        if time.monotonic() - self._counted > _COUNT_SECONDS:
            self._counted = time.monotonic()
            self._entries = {name: (table.count(), table.limit) for name, table in self._tables.named().items()}
        entries = GaugeMetricFamily("sidestep_map_entries", "Entries of a BPF map", labels=["map"])
        limits = GaugeMetricFamily("sidestep_map_max_entries", "Most entries that a BPF map can have", labels=["map"])
        for name, (count, limit) in self._entries.items():
            entries.add_metric([name], count)
            limits.add_metric([name], limit)
        yield entries
        yield limits

    def _connections(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "sidestep_connections",
            "Connections of enrolled pods, by direction and verdict",
            labels=["direction", "verdict"],
        )
        for (direction, verdict), count in self._tables.connection_totals().items():
            family.add_metric([direction, verdict], count)
        yield family

    def _uncaptured(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "sidestep_uncaptured",
            "What enrolled pods have sent or got past their proxies, and what was refused",
            labels=["direction", "what"],
        )
        for (direction, what), count in self._tables.passages().items():
            family.add_metric([direction, what], count)
        yield family

    def _shadows(self) -> Iterator[Metric]:
        """The sums of pods that have ended are there too, so the counters never fall."""
        every = [sums for _, sums in self._tables.shadow_sums.every()]
        family = CounterMetricFamily(
            "sidestep_shadow_connections",
            "Connections of shadow pods, by whether netfilter did what sidestep would have done",
            labels=["outcome"],
        )
        family.add_metric(["same"], sum(sums.same for sums in every))
        family.add_metric(["different"], sum(sums.different for sums in every))
        family.add_metric(["not_compared"], sum(sum(sums.not_compared) for sums in every))
        yield family
        yield GaugeMetricFamily(
            "sidestep_shadow_pods",
            "Pods that Istio's rules capture and sidestep watches; they are among the enrolled pods",
            value=len(self._enrolments.shadows()),
        )

    def _flows(self) -> Iterator[Metric]:
        """Of closed connections: those that are open cost a look into each pod's namespace."""
        connections = CounterMetricFamily(
            "sidestep_closed_connections", "Connections of applications that have closed", labels=["direction"]
        )
        carried = CounterMetricFamily(
            "sidestep_closed_connections_bytes",
            "Bytes that applications have sent and received on connections that have closed",
            labels=["direction", "what"],
        )
        again = CounterMetricFamily(
            "sidestep_closed_connections_retransmits",
            "Segments sent again on connections that have closed",
            labels=["direction"],
        )
        totals = self._tables.flow_totals()
        for direction, total in totals.items():
            connections.add_metric([direction], total.connections)
            carried.add_metric([direction, "sent"], total.sent)
            carried.add_metric([direction, "received"], total.received)
            again.add_metric([direction], total.retransmits)
        yield from (connections, carried, again)
        counts = accumulate(self._tables.lifetimes())
        duration = HistogramMetricFamily(
            "sidestep_connection_duration_seconds", "Seconds from established to closed", labels=[]
        )
        bounds = (*map(str, map(float, LIFETIMES)), "+Inf")
        nanoseconds = sum(total.duration for total in totals.values())
        duration.add_metric([], list(zip(bounds, counts, strict=True)), nanoseconds / 1e9)
        yield duration

    def _lost_handovers(self) -> Iterator[Metric]:
        now = {key.cookie: count.quad for key, count in self._tables.lost_handovers.every()}
        self._lost_before += sum(count for cookie, count in self._lost.items() if cookie not in now)
        self._lost = now
        yield CounterMetricFamily(
            "sidestep_lost_handovers",
            "Captured connections that reached the proxy without their original destination",
            value=self._lost_before + sum(now.values()),
        )

    def _acceleration(self) -> Iterator[Metric]:
        level = level_of(self._tables).level
        yield GaugeMetricFamily("sidestep_acceleration_level", "The node's level: 0 off, 1 proxy, 2 full", value=level)
        now = {key.cookie: sums for key, sums in self._tables.traffic.every()}
        self._ended += [sums for cookie, sums in self._traffic.items() if cookie not in now]
        self._ended = [_sum(self._ended)]  # with the pods that are gone: a counter must not fall
        self._traffic = now
        total = _sum([*self._ended, *now.values()])
        messages = CounterMetricFamily(
            "sidestep_accelerated_messages",
            "Messages sent on connections within the node, by outcome",
            labels=["outcome"],
        )
        for outcome in ("redirected", "undrained", "over_budget", "no_peer"):
            messages.add_metric([outcome], getattr(total, outcome))
        yield messages
        yield CounterMetricFamily(
            "sidestep_accelerated_bytes", "Bytes redirected past TCP", value=total.redirected_bytes
        )


def _sum(of: Iterable[TrafficEntry]) -> TrafficEntry:
    """The sum of all entries, field by field."""
    every = list(of)
    return TrafficEntry(*(sum(getattr(each, field[0]) for each in every) for field in TrafficEntry._fields_))


def _code_name(code: int) -> str:
    if code == 0:
        return HTTPStatus.OK.name
    return Code(code).name if code in set(Code) else str(code)


def _http_status(code: int) -> HTTPStatus:
    if code == 0:
        return HTTPStatus.OK
    return HTTPStatus.BAD_REQUEST if code in _BAD_REQUEST else HTTPStatus.INTERNAL_SERVER_ERROR
