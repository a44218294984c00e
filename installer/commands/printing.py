"""Tables for people, in the same style for every command. They fit the terminal; without one they have more room."""

import sys
import textwrap
from collections.abc import Collection, Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from installer.probe.findings import plain_width

_WIDEST = 10_000  # terminal columns: more than any table needs


def table(
    titles: Iterable[str], rows: Iterable[Iterable[Any]], texts: Collection[str], has_titles: bool = True
) -> RenderableType:
    """Rows under titles. The columns in `texts` are aligned left, all others (numbers) right. None becomes a dash."""
    made = Table(box=SIMPLE_HEAD if has_titles else None, padding=(0, 1, 0, 0), show_header=has_titles)
    for title in titles:
        made.add_column(title.upper(), justify="left" if title in texts else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    return made


def fits(whole: RenderableType) -> bool:
    """Whether it fits into the width without folded lines."""
    console = _console()
    return console.measure(whole, options=console.options.update(max_width=_WIDEST)).maximum <= console.width


def rendered(*parts: RenderableType) -> str:
    """The text for stdout, without spaces at line ends. A narrow terminal folds long words."""
    console = _console()
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()) + "\n"


def line(text: str, first: str = "", hanging: str = "  ") -> Text:
    """A line that begins with `first`. A terminal gets it broken between words, with `hanging` before the other lines.

    Elsewhere it stays whole, so that grep finds all of it.
    """
    if not sys.stdout.isatty():
        return Text(first + text)
    given = {"initial_indent": first, "subsequent_indent": hanging, "width": _console().width}
    return Text(textwrap.fill(text, **given, break_on_hyphens=False, break_long_words=False))  # type: ignore[arg-type]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else plain_width())
