"""How commands print what they have found: something for people, JSON or YAML for programs."""

import json
from collections.abc import Callable
from typing import Any

import click


def output_or(people: str) -> Callable[[Any], Any]:
    """The option of a command that prints `people` unless it is asked for something else."""
    return click.option(
        "--output",
        type=click.Choice([people, "json", "yaml"]),
        default=people,
        show_default=True,
        help="How it is printed.",
    )


output_option = output_or("table")


def show(document: Any, output: str, table: Callable[[], str]) -> None:
    """Print a document of plain values, or what `table` makes of it."""
    click.echo(encoded(document, output) if output in ("json", "yaml") else table(), nl=False)


def encoded(document: Any, output: str) -> str:
    """A document of plain values as JSON or YAML."""
    return json.dumps(document, indent=2) + "\n" if output == "json" else yaml_of(document)


def yaml_of(document: Any) -> str:
    """A document of plain values as YAML; by libyaml, which is twenty times as fast, where there is one."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # not every PyYAML has the former
    text: str = yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text
