"""The list of pinned maps for people."""

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType

from installer.commands.printing import table

_TITLES = ("map", "kind", "entries", "limit", "bytes")
_TEXTS = ("map", "kind")  # all other columns are numbers, aligned right


def maps_table(maps: Iterable[dict[str, Any]], has_titles: bool = True) -> RenderableType:
    """One line a map."""
    rows = ([each["name"], *(each[title] for title in _TITLES[1:])] for each in maps)
    return table(_TITLES, rows, _TEXTS, has_titles)
