"""What was aimed at before anything was measured, as ratios of one interleaved run; and whether it was met."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.mesh.blocks import judged
from tests.bench.mesh.ratios import BASELINE, Metric, Samples, Spread
from tests.bench.mesh.workloads import WORKLOADS, Generator, Workload

LEVELS = ("proxy", "full")


@dataclass(frozen=True)
class Aim:
    """One figure of a level, compared with another way in the same round."""

    levels: tuple[str, ...]
    metric: Metric
    against: str
    is_ceiling: bool  # else the ratio must not be lower
    bound: float
    concerns: Callable[[Workload], bool]

    @property
    def wording(self) -> str:
        """As it is shown beside the figure."""
        return f"{'≤' if self.is_ceiling else '≥'} {self.bound}"

    def verdict(self, found: Spread | None) -> str:
        """The rounds' median decides."""
        return "not measured" if found is None else judged(found, self.bound, self.is_ceiling)


def _keeps_connections(workload: Workload) -> bool:
    return not workload.is_closing


def _has_requests(workload: Workload) -> bool:
    return workload.generator is not Generator.IPERF3


AIMS = (
    # the same Envoys over unix sockets: what no interception could do better than
    Aim(("full",), Metric.RATE, "unix", False, 0.95, _keeps_connections),
    Aim(("proxy",), Metric.RATE, "off", False, 1.0, lambda _: True),
    Aim(("proxy",), Metric.CPU, BASELINE, True, 0.9, lambda each: each.name.startswith("keepalive-32-")),
    Aim(LEVELS, Metric.P99, BASELINE, True, 1.0, _has_requests),
    Aim(LEVELS, Metric.RATE, BASELINE, False, 1.1, lambda each: each.is_closing),
)


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    workload: str
    metric: Metric
    level: str
    against: str
    found: Spread | None
    aim: str
    verdict: str


def verdicts(samples: Samples) -> list[Verdict]:
    """Every aim for every workload that it concerns, whatever was measured."""
    rows = []
    for aim in AIMS:
        for name, workload in WORKLOADS.items():
            for level in aim.levels if aim.concerns(workload) else ():
                found = samples.ratio(name, level, aim.metric, aim.against)
                rows.append(Verdict(name, aim.metric, level, aim.against, found, aim.wording, aim.verdict(found)))
    return rows
