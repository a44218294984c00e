"""`python -m docs.chart` writes the values.yaml of the chart, and its table in helm.md. `make docs` runs it.

Both come from the chart's values.schema.json, where each value has its type, its default and a description. Values
without a default are accepted and have no effect, so nothing shows them.
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).with_name("helm.md")
CHART = Path(__file__).parents[1] / "manifests" / "charts" / "sidestep"
VALUES = CHART / "values.yaml"
_MARK = "<!-- Everything below is from the chart's values.schema.json. `make docs` writes it. -->\n"
_HEAD = "# Written by `make docs` from values.schema.json: change a default or its description there.\n\n"
_COLUMNS = 120


def schema() -> dict[str, Any]:
    """The chart's schema."""
    document: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return document


def values() -> str:
    """All of values.yaml."""
    return _HEAD + "\n".join(_lines(schema()["properties"], ""))


def page() -> str:
    """All of helm.md: the part written by hand, then a table of the values."""
    by_hand, mark, _ = PAGE.read_text().partition(_MARK)
    rows = [
        f"| `{name}` | {_shown(value['default'])} | {value['description']} |"
        for name, value in _described(schema()["properties"])
    ]
    return by_hand + mark + "\n".join(["", "| value | default | what it does |", "|---|---|---|", *rows, ""])


def _lines(properties: dict[str, Any], indent: str) -> Iterator[str]:
    for name, value in properties.items():
        if "properties" in value:
            yield f"{indent}{name}:"
            yield from _lines(value["properties"], indent + "  ")
        elif "default" in value:
            comment = f"{indent}# "
            yield from textwrap.wrap(
                value["description"].replace("`", ""), _COLUMNS, initial_indent=comment, subsequent_indent=comment
            )
            yield textwrap.indent(yaml.safe_dump({name: value["default"]}, sort_keys=False).rstrip(), indent)
    if not indent:
        yield ""


def _described(properties: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in properties.items():
        if "properties" in value:
            yield from _described(value["properties"], f"{above}{name}.")
        elif "default" in value:
            yield above + name, value


def _shown(default: Any) -> str:
    return "" if default in (None, "") else f"`{json.dumps(default, ensure_ascii=False)}`"


if __name__ == "__main__":
    VALUES.write_text(values())
    PAGE.write_text(page())
