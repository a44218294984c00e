"""How commands print what they have found: a table for people, JSON or YAML for programs."""

import json
from collections.abc import Callable
from typing import Any

import click

output_option = click.option(
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How it is printed.",
)


def show(document: Any, output: str, table: Callable[[], str]) -> None:
    """Print a document of plain values, or what `table` makes of it."""
    if output == "table":
        click.echo(table(), nl=False)
    elif output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        import yaml

        click.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)
