"""What an examination found, and how it is told: a table for people, a document for programs."""

import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from bpf.errors import SidestepError
from bpf.probing.features import Presence

_PLAIN_WIDTH = 120  # columns where there is no terminal to ask
# titles, and widths that fit the longest word of the rows that are always there, in 80 columns
_COLUMNS = (("what", 17), ("needed by", 16), ("found", 10), ("verdict", 7), ("what to do", 10))
_COLOURS = {Presence.YES: "green", Presence.NO: "bold red", Presence.UNKNOWN: "magenta", Presence.WARNING: "yellow"}


class NodeUnfit(SidestepError):
    """Capture would not work on this node; the message is the table."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    needed_by: str
    found: str
    verdict: Presence
    advice: str = ""  # what to do, unless all is well


@dataclass(frozen=True)
class Findings:
    """Everything that was looked at, in order."""

    rows: tuple[Finding, ...]

    @property
    def works(self) -> bool:
        """Whether capture will work. What could not be tried is not known to work."""
        return all(row.verdict in (Presence.YES, Presence.WARNING) for row in self.rows)

    @property
    def summary(self) -> str:
        """One sentence."""
        counts = {verdict: sum(row.verdict is verdict for row in self.rows) for verdict in Presence}
        if self.works:
            warnings = counts[Presence.WARNING]
            return "capture will work" + (f", with {warnings} warning{'s'[: warnings > 1]}" if warnings else "")
        told = [
            f"{counts[v]} {word}" for v, word in ((Presence.NO, "missing"), (Presence.UNKNOWN, "unknown")) if counts[v]
        ]
        return f"capture will not work here: of {len(self.rows)} things needed, {', '.join(told)}"

    def document(self) -> dict[str, Any]:
        """The same for JSON and YAML."""
        rows = [{**asdict(row), "verdict": str(row.verdict)} for row in self.rows]
        return {"works": self.works, "summary": self.summary, "rows": rows}

    def table(self, stream: TextIO | None = None) -> str:
        """The table and its summary as they suit `stream` (default: stdout): coloured on a terminal, else plain."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        stream = stream or sys.stdout
        terminal = stream.isatty()
        console = Console(file=stream, width=None if terminal else plain_width())
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        advised = any(row.advice for row in self.rows)
        for title, least in _COLUMNS if advised else _COLUMNS[:-1]:
            table.add_column(title, min_width=least, overflow="fold")
        for row in self.rows:
            verdict = Text(row.verdict, style=_COLOURS[row.verdict])
            table.add_row(Text(row.what), Text(row.needed_by), Text(row.found), verdict, *[Text(row.advice)][:advised])
        with console.capture() as captured:
            console.print(table)
            console.print(Text(self.summary, style="bold"))
        lines = captured.get().splitlines()
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def require(self) -> None:
        """Raise NodeUnfit, which names what is wrong and then shows the table, unless capture will work."""
        bad = [f"{row.what} {row.found}" for row in self.rows if row.verdict is Presence.NO]
        bad = bad or [f"{row.what} {row.found}" for row in self.rows if row.verdict is Presence.UNKNOWN]
        if not self.works:
            raise NodeUnfit(f"this node can't capture: {'; '.join(bad)}\n{self.table(sys.stderr)}".rstrip())


def plain_width() -> int:
    """Columns where there is no terminal: what COLUMNS says, else enough for most tables."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else _PLAIN_WIDTH
