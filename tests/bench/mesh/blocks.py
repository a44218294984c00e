"""What is measured beside the load: a table each, for the page, the JSON and the terminal alike."""

from dataclasses import dataclass, field
from typing import Any

from tests.bench.mesh.ratios import Spread


@dataclass(frozen=True)
class Block:
    """One table; `data` has the figures behind it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str
    data: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """A section of the page."""
        return f"## {self.title}\n\n{table(self.head, self.rows)}\n{self.note}\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; figures to the right."""
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def judged(found: Spread, bound: float, is_ceiling: bool) -> str:
    """Met or not, by the median as it is shown."""
    shown = round(found.median, 2)
    return "met" if (shown <= bound if is_ceiling else shown >= bound) else "**not met**"
