"""What an examination of a node has found, and how it is shown."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

import yaml
from rich.console import Console
from rich.table import Table


class Verdict(StrEnum):
    """Of one row. Only NO keeps capture from working."""

    YES = "yes"
    WARNING = "warning"
    UNKNOWN = "unknown"
    NO = "no"


_STYLES = {Verdict.YES: "green", Verdict.WARNING: "yellow", Verdict.UNKNOWN: "yellow", Verdict.NO: "bold red"}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    what: str
    needed_by: str
    found: str
    verdict: Verdict
    advice: str = ""


@dataclass(frozen=True)
class Findings:
    """All of them."""

    rows: tuple[Row, ...]

    @property
    def works(self) -> bool:
        """Whether capture will work."""
        return all(row.verdict is not Verdict.NO for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def print(self, console: Console) -> None:
        """As a table; coloured on a terminal."""
        table = Table(show_edge=False, pad_edge=False)
        for heading in ("what", "needed by", "found", "verdict", "what to do"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            verdict = f"[{_STYLES[row.verdict]}]{row.verdict}[/]"
            table.add_row(row.what, row.needed_by, row.found, verdict, row.advice)
        console.print(table)

    def as_json(self) -> str:
        """For programs."""
        return json.dumps({"works": self.works, "rows": [asdict(row) for row in self.rows]}, indent=2)

    def as_yaml(self) -> str:
        """For people who like it."""
        return yaml.safe_dump(json.loads(self.as_json()), sort_keys=False)
