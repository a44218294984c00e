"""How commands print their results: a table or page for people, JSON or YAML for programs."""

import json
from collections.abc import Callable
from typing import Any

import click


def output_or(people: str, *further: str) -> Callable[[Any], Any]:
    """The option --output. Its default is `people`, the format for people; `further` formats are the command's own."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice([people, *(["wide"] if people == "table" else []), "json", *further, "yaml"]),
        default=people,
        show_default=True,
        help="Output format.",
    )


output_option = output_or("table")
streaming_output_option = output_or("table", "jsonl")


def show(document: Any, output: str, table: Callable[[], str]) -> None:
    """Print a document of plain values, or for people the text that `table` returns."""
    click.echo(encoded(document, output) if output in ("json", "jsonl", "yaml") else table(), nl=False)


def encoded(document: Any, output: str) -> str:
    """A document of plain values as JSON or YAML; as JSON lines, a list is a line for each of its elements."""
    if output == "jsonl":
        each = document if isinstance(document, list) else [document]
        return "".join(json.dumps(one) + "\n" for one in each)
    return json.dumps(document, indent=2) + "\n" if output == "json" else yaml_of(document)


def yaml_of(document: Any) -> str:
    """A document of plain values as YAML. If PyYAML has libyaml, that is used: it is twenty times as fast."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text
