"""Tables for people, as wide as the terminal; a file or a pipe gets them unbroken."""

import sys
from collections.abc import Iterable

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNBROKEN = 400  # columns


def show_table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print rows under titles; None is a dash."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in titles:
        made.add_column(title.upper(), overflow="fold")
    for row in rows:
        made.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _UNBROKEN)
    with console.capture() as captured:
        console.print(made)
    click.echo("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()))
