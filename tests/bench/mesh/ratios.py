"""From samples to ratios: within a round, then over the rounds. What drifts with the machine cancels out."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tests.bench.mesh.load import Sample

BASELINE = "iptables"


class Metric(StrEnum):
    """What is read from a sample."""

    RATE = "rate"
    P50 = "p50"
    P99 = "p99"
    CPU = "cpu"
    PODS = "pods-cpu"


TITLES = {
    Metric.RATE: "requests/s",
    Metric.P50: "p50 of a request",
    Metric.P99: "p99 of a request",
    Metric.CPU: "CPU per 1,000 requests",
    Metric.PODS: "CPU of the pods' cgroups per 1,000 requests",
}


@dataclass(frozen=True)
class Spread:
    """The rounds' median, lowest and highest value."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(values: Iterable[float]) -> Spread | None:
    """None where there is nothing."""
    known = list(values)
    return Spread(statistics.median(known), min(known), max(known)) if known else None


def value(sample: Sample, metric: Metric) -> float | None:
    """Requests per second, microseconds, or processor seconds per 1,000 requests."""
    figures = sample.figures
    if metric is Metric.P50:
        return figures.p50
    if metric is Metric.P99:
        return figures.p99
    if not figures.requests:
        return None
    if metric is Metric.RATE:
        return figures.requests / figures.seconds
    seconds = sample.spent.machine if metric is Metric.CPU else sample.spent.pods
    return seconds * 1000 / figures.requests


class Samples:
    """All of a run, by what they are of."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._by_place = {(each.workload, each.scenario, each.round): each for each in samples}

    @property
    def rounds(self) -> list[int]:
        """Numbers of the rounds."""
        return sorted({number for _, _, number in self._by_place})

    @property
    def errors(self) -> dict[tuple[str, str], int]:
        """Requests that failed, by workload and scenario; only where there are some."""
        counts: dict[tuple[str, str], int] = {}
        for (workload, scenario, _), sample in self._by_place.items():
            if sample.figures.errors:
                counts[workload, scenario] = counts.get((workload, scenario), 0) + sample.figures.errors
        return counts

    def has(self, workload: str) -> bool:
        """Whether the run had it."""
        return any(each == workload for each, _, _ in self._by_place)

    def absolute(self, workload: str, scenario: str, metric: Metric) -> Spread | None:
        """This machine's figures."""
        return spread(each for number in self.rounds if (each := self._at(workload, scenario, number, metric)))

    def ratio(self, workload: str, scenario: str, metric: Metric, against: str = BASELINE) -> Spread | None:
        """To another way in the same round."""
        found = []
        for number in self.rounds:
            ours = self._at(workload, scenario, number, metric)
            theirs = self._at(workload, against, number, metric)
            if ours is not None and theirs:
                found.append(ours / theirs)
        return spread(found)

    def received(self, workload: str, scenario: str) -> Spread | None:
        """MB/s."""
        places = [self._by_place.get((workload, scenario, number)) for number in self.rounds]
        return spread(each.figures.received / each.figures.seconds / 1e6 for each in places if each)

    def messages(self, workload: str, scenario: str) -> dict[str, int]:
        """What became of messages in all rounds."""
        sums: dict[str, int] = {}
        for number in self.rounds:
            sample = self._by_place.get((workload, scenario, number))
            for key, count in sample.messages.items() if sample else ():
                sums[key] = sums.get(key, 0) + count
        return sums

    def _at(self, workload: str, scenario: str, number: int, metric: Metric) -> float | None:
        sample = self._by_place.get((workload, scenario, number))
        return value(sample, metric) if sample else None
