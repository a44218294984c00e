"""Entries of a map as they are read, piece by piece: a map of 250,000 entries takes no more memory than one of 250."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from installer.commands.maps.decode import Plain
from installer.commands.maps.listing import Listing
from installer.probe.findings import plain_width

_SAMPLE = 250  # entries by which the widths of columns are chosen
_GAP = "  "

Row = dict[str, str]


def pieces(listing: Listing, output: str) -> Iterator[str]:
    """The text in one of the three forms, to be printed without more line ends."""
    yield from {"json": _json, "yaml": _yaml, "table": _table}[output](listing)


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
    """The same document."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml is twenty times as fast
    yield yaml.safe_dump({"map": listing.name})
    empty = True
    for entry in listing:
        yield "entries:\n" * empty + yaml.dump([entry], Dumper=dumper, sort_keys=False, allow_unicode=True)
        empty = False
    yield "entries: []\n" * empty + yaml.safe_dump({"left_out": listing.left_out})


def _table(listing: Listing) -> Iterator[str]:
    """Columns where they fit, else a paragraph for each entry."""
    rows = map(_row, listing)
    sample = list(islice(rows, _SAMPLE))
    if not sample:
        yield f"{listing.name}: no entries\n"
        return
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in sample)) for name in sample[0]}
    fits = sum(widths.values()) + len(_GAP) * (len(widths) - 1) <= _width()
    yield from _columns(chain(sample, rows), widths) if fits else _paragraphs(chain(sample, rows))
    if listing.left_out:
        yield f"{listing.left_out} more entries left out; --limit {listing.left_out + (listing.limit or 0)} shows all\n"


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else plain_width()


def _columns(rows: Iterable[Row], widths: dict[str, int]) -> Iterator[str]:
    yield _line(widths, {name: name for name in widths})
    for row in rows:
        yield _line(widths, row)


def _line(widths: dict[str, int], row: Row) -> str:
    return _GAP.join(row.get(name, "").ljust(width) for name, width in widths.items()).rstrip() + "\n"


def _paragraphs(rows: Iterable[Row]) -> Iterator[str]:
    before = ""
    for row in rows:
        width = max(map(len, row))
        yield before + "".join(f"{name.ljust(width)}{_GAP}{text}\n" for name, text in row.items())
        before = "\n"


def _row(entry: dict[str, Plain]) -> Row:
    """Key and value side by side; a name that both have says whose it is."""
    key, value = dict(_flat(entry["key"])), dict(_flat(entry["value"]))
    return {
        **{f"key.{name}" if name in value else name: text for name, text in key.items()},
        **{f"value.{name}" if name in key else name: text for name, text in value.items()},
    }


def _flat(plain: Plain) -> Iterator[tuple[str, str]]:
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, _told(value)


def _told(value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
