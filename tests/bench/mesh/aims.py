"""What was aimed at before anything was measured, as ratios to iptables in the same run; and whether it was met."""

from dataclasses import dataclass

from tests.bench.mesh.blocks import judged
from tests.bench.mesh.ratios import Metric, Samples, Spread

LEVELS = ("proxy", "full")


@dataclass(frozen=True)
class Aim:
    """One figure for each level."""

    workloads: tuple[str, ...]
    metric: Metric
    is_ceiling: bool  # else the ratio must not be lower
    bounds: tuple[float, float]  # by LEVELS

    def wording(self, level: str) -> str:
        """As it is shown beside the figure."""
        return f"{'≤' if self.is_ceiling else '≥'} {self.bounds[LEVELS.index(level)]}"

    def verdict(self, level: str, found: Spread | None) -> str:
        """The rounds' median decides."""
        if found is None:
            return "not measured"
        return judged(found, self.bounds[LEVELS.index(level)], self.is_ceiling)


def _both(name: str) -> tuple[str, ...]:
    return f"{name}-tcp", f"{name}-http"


AIMS = (
    Aim(_both("keepalive-32"), Metric.RATE, False, (1.4, 1.8)),
    Aim(_both("body-64k"), Metric.RATE, False, (1.8, 2.4)),
    Aim(_both("keepalive-1"), Metric.P50, True, (0.9, 0.6)),
    Aim(_both("new-connection"), Metric.RATE, False, (1.1, 1.1)),
    Aim(("stream-64", "stream-1024"), Metric.RATE, False, (0.95, 0.9)),
    Aim(_both("keepalive-32"), Metric.CPU, True, (0.75, 0.6)),
)


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    workload: str
    metric: Metric
    level: str
    found: Spread | None
    aim: str
    verdict: str


def verdicts(samples: Samples) -> list[Verdict]:
    """Every aim at every level, for both kinds of Envoy, whatever was measured."""
    rows = []
    for aim in AIMS:
        for workload in aim.workloads:
            for level in LEVELS:
                found = samples.ratio(workload, level, aim.metric)
                said = aim.verdict(level, found)
                rows.append(Verdict(workload, aim.metric, level, found, aim.wording(level), said))
    return rows
