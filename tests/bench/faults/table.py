"""What the rounds of both ways come to: one row a figure, and whether the ways differ. Nothing here touches a pod."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_NOISE = 0.05  # of all that could be counted: less is no difference


class Way(StrEnum):
    """Who brings a pod's connections to its proxy."""

    RULES = "REDIRECT rules"
    SIDESTEP = "sidestep"


@dataclass(frozen=True)
class Fault:
    """One figure that a public report is about."""

    report: str
    reported: str  # what the report says, in a few words
    counted: str
    of: int  # the most that one round can count


@dataclass(frozen=True)
class Row:
    """A figure's rounds, by way."""

    fault: Fault
    rules: tuple[int, ...]
    sidestep: tuple[int, ...]

    @property
    def differs(self) -> bool:
        """Whether the ways' sums are further apart than a twentieth of what could be counted."""
        most = self.fault.of * len(self.rules)
        return abs(sum(self.rules) - sum(self.sidestep)) > _NOISE * most

    def cells(self) -> list[str]:
        """The row as text."""
        rounds = [f"{', '.join(f'{each:,}' for each in counts)}" for counts in (self.rules, self.sidestep)]
        counted = f"{self.fault.counted}, of {self.fault.of:,} a round"
        return [self.fault.report, self.fault.reported, counted, *rounds, "yes" if self.differs else "no"]


@dataclass(frozen=True)
class NotRun:
    """A report that was left out."""

    report: str
    reported: str
    why: str

    def cells(self) -> list[str]:
        """The row as text."""
        return [self.report, self.reported, f"not run: {self.why}", "", "", ""]


def table(rows: Sequence[Row], left_out: Sequence[NotRun]) -> str:
    """A table in markdown."""
    head = ["report", "what was reported", "counted", *Way, "differs"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows), *(each.cells() for each in left_out)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdict(rows: Sequence[Row]) -> str:
    """The last line of the command."""
    return f"faults of NAT: {sum(row.differs for row in rows)} of {len(rows)} rows differ"
