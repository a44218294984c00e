"""Tables for people, the same for every command: as wide as the terminal, and with room where there is none."""

import sys
from collections.abc import Collection, Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from installer.probe.findings import plain_width

_WIDEST = 10_000  # columns: more than any table has


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]], texts: Collection[str]) -> RenderableType:
    """Rows under titles; `texts` are to the left, other columns are numbers, to the right. Unknown cells are dashes."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in titles:
        made.add_column(title, justify="left" if title in texts else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    return made


def fits(whole: RenderableType) -> bool:
    """Whether nothing of it has to be folded."""
    console = _console()
    return console.measure(whole, options=console.options.update(max_width=_WIDEST)).maximum <= console.width


def rendered(*parts: RenderableType) -> str:
    """As it suits stdout, without spaces at the ends of lines; narrow terminals fold long words."""
    console = _console()
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()) + "\n"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else plain_width())
