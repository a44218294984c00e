"""Writes entries of a map while they are read, so that 250,000 entries take no more memory than a few."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from installer.commands.maps.decode import Plain
from installer.commands.maps.listing import Listing
from installer.commands.output import yaml_of
from installer.commands.printing import fits, rendered, table

_TOGETHER = 1000  # entries in one table, which is laid out as a whole; further entries get further tables

Row = dict[str, str]


def pieces(listing: Listing, output: str, has_titles: bool = True) -> Iterator[str]:
    """The text in the format `output`, piece by piece. The pieces have all line ends that are needed."""
    if output in ("table", "wide"):
        yield from _table(listing, has_titles)
    else:
        yield from {"json": _json, "jsonl": _jsonl, "yaml": _yaml}[output](listing)


def _jsonl(listing: Listing) -> Iterator[str]:
    """{"map": …, "entries": […], "left_out": n} is for those who read all of it; here each entry is a line."""
    yield from (json.dumps(entry) + "\n" for entry in listing)


def _json(listing: Listing) -> Iterator[str]:
    """{"map": …, "entries": […], "left_out": n}."""
    yield f'{{\n  "map": {json.dumps(listing.name)},\n  "entries": ['
    before = "\n    "
    for entry in listing:
        yield before + json.dumps(entry)
        before = ",\n    "
    end = "" if before == "\n    " else "\n  "
    yield f'{end}],\n  "left_out": {listing.left_out}\n}}\n'


def _yaml(listing: Listing) -> Iterator[str]:
    """The same document as YAML."""
    yield yaml_of({"map": listing.name})
    empty = True
    for entry in listing:
        yield "entries:\n" * empty + yaml_of([entry])
        empty = False
    yield "entries: []\n" * empty + yaml_of({"left_out": listing.left_out})


def _table(listing: Listing, has_titles: bool) -> Iterator[str]:
    """Columns if they fit the width, else a paragraph for each entry."""
    rows = map(_row, listing)
    empty = True
    while some := list(islice(rows, _TOGETHER)):
        columns = table(some[0], (each.values() for each in some), some[0], has_titles)
        yield rendered(columns) if fits(columns) else "".join(map(_paragraph, some))
        empty = False
    if empty and has_titles:
        yield f"{listing.name}: no entries\n"
    if listing.left_out and has_titles:
        yield f"{listing.left_out} more entries left out; --limit {listing.left_out + (listing.limit or 0)} shows all\n"


def _paragraph(row: Row) -> str:
    width = max(map(len, row))
    return "".join(f"{name.ljust(width)}  {text}\n" for name, text in row.items()) + "\n"


def _row(entry: dict[str, Plain]) -> Row:
    """Key and value side by side. A name that both have is written key.NAME and value.NAME."""
    key, value = dict(_flat(entry["key"])), dict(_flat(entry["value"]))
    return {
        **{f"key.{name}" if name in value else name: text for name, text in key.items()},
        **{f"value.{name}" if name in key else name: text for name, text in value.items()},
    }


def _flat(plain: Plain) -> Iterator[tuple[str, str]]:
    """The innermost names. One that several structures of an entry have is written STRUCTURE.NAME."""
    inner = Counter(name for value in plain.values() if isinstance(value, dict) for name in value)
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{each}" if inner[each] > 1 else each, text) for each, text in _flat(value))
        else:
            yield name, _told(value)


def _told(value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
